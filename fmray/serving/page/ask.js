// Ask about the pictures: a conversation, told token by token.

import { Failure, chunks, request } from "./api.js";
import { withPictures } from "./snippets.js";
import { Panel, element } from "./panel.js";

const at = (id) => document.getElementById(id);

export class AskPanel extends Panel {
  turns = [];

  constructor(root, page) {
    super(root, page);
    this.talk = root.querySelector(".talk");
    at("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    at("start-over").addEventListener("click", () => this.startOver());
  }

  /** Whether it reads one question about one picture and nothing before it. */
  get single() {
    return this.model?.kind === "vqa";
  }

  /** The pictures that the next question brings: those that the conversation has not had yet. */
  get fresh() {
    const { pictures, chosen } = this.page.tray;
    if (this.single) return chosen ? [chosen] : [];
    const had = new Set(this.turns.flatMap((turn) => turn.pictures));
    return pictures.filter((picture) => !had.has(picture));
  }

  changedModel() {
    this.startOver();
  }

  startOver() {
    this.running?.abort();
    this.turns = [];
    this.talk.replaceChildren();
    at("start-over").hidden = true;
    this.refresh();
  }

  refresh() {
    const fresh = this.fresh;
    const named = fresh.length === 1 ? fresh[0].name : `${fresh.length} pictures`;
    let along = fresh.length ? `Goes along: ${named}.` : "";
    if (this.single) along ||= "This model answers one question about one picture: choose one first.";
    else if (!fresh.length && !this.turns.length) along = "Choose pictures to ask about, or ask without one.";
    at("goes-along").textContent = along;
    super.refresh();
  }

  current() {
    const messages = [];
    for (const turn of this.single ? [] : this.turns) {
      messages.push(asMessage(turn.pictures, turn.question), { role: "assistant", content: turn.answer });
    }
    messages.push(asMessage(this.fresh, at("question").value.trim() || "What is this?"));
    const body = { model: this.model.id, messages, stream: true, stream_options: { include_usage: true } };
    const [longest, temperature] = [at("longest").valueAsNumber, at("temperature").valueAsNumber];
    if (longest > 0) body.max_completion_tokens = longest;
    if (temperature > 0) body.temperature = temperature;
    return { model: this.model, route: "chat/completions", body };
  }

  async work({ signal, waiting }) {
    const question = at("question").value.trim();
    if (!question) {
      at("question").focus();
      throw new Failure("write a question first");
    }
    if (this.single && !this.fresh.length) throw new Failure("choose a picture first: this model answers questions about one");
    const turn = { question, pictures: this.fresh, answer: "" };
    const { model, route, body } = this.current();
    const asked = element("div", { className: "asked" }, ...turn.pictures.map((each) => element("img", { src: each.url, alt: each.name })));
    asked.append(element("p", { textContent: question }));
    const said = new Said(this.page, this.form.querySelector(".row"));
    this.talk.append(asked, said.root);
    said.follow();
    at("question").value = "";
    try {
      const response = await request(model.url(route), { body: withPictures(body, (each) => each.data), signal, waiting });
      this.say("");
      for await (const chunk of chunks(response)) said.take(chunk);
      turn.answer = said.text;
      this.#keep(turn);
      said.end();
    } catch (error) {
      if (said.begun) {
        turn.answer = said.text || "…";
        this.#keep(turn);
        said.end(signal.aborted ? "stopped" : "broke off");
      } else {
        asked.remove();
        said.root.remove();
        at("question").value ||= question;
      }
      throw error;
    }
  }

  #keep(turn) {
    if (!this.talk.hasChildNodes()) return; // it was started over meanwhile
    this.turns.push(turn);
    at("start-over").hidden = false;
  }
}

function asMessage(pictures, text) {
  const parts = pictures.map((picture) => ({ type: "image_url", image_url: { url: picture } }));
  return { role: "user", content: parts.length ? [...parts, { type: "text", text }] : text };
}

class Said {
  /** An answer as it comes: on the screen by tokens, to a screen reader by sentences. */
  constructor(page, below) {
    this.page = page;
    this.below = below;
    this.text = "";
    this.told = 0;
    this.begun = false;
    this.cut = false;
    this.usage = null;
    this.started = performance.now();
    this.words = element("p");
    this.facts = element("p", { className: "quiet" });
    this.root = element("div", { className: "said going" }, this.words, this.facts);
  }

  take(chunk) {
    this.begun = true;
    if (chunk.usage) this.usage = chunk.usage;
    const [choice] = chunk.choices;
    if (!choice) return;
    const inView = this.below.getBoundingClientRect().bottom <= innerHeight;
    this.text += choice.delta.content ?? "";
    this.words.textContent = this.text;
    if (inView) this.follow(); // unless its reader has scrolled away
    this.cut ||= choice.finish_reason === "length";
    const ended = this.text.slice(this.told).match(/^[\s\S]*[.!?](?=\s)/);
    if (ended) this.#tell(ended[0]);
  }

  /** Keep the form below the answer on the screen. */
  follow() {
    this.below.scrollIntoView({ block: "nearest" });
  }

  end(how = "") {
    const inView = this.below.getBoundingClientRect().bottom <= innerHeight;
    this.root.classList.remove("going");
    this.#tell(this.text.slice(this.told) || (this.text ? "" : "The answer is empty"));
    if (!this.text) this.words.textContent = "(an empty answer)";
    const facts = [how];
    if (this.usage) facts.push(`${this.usage.completion_tokens} tokens`);
    facts.push(`${((performance.now() - this.started) / 1000).toFixed(1)} s`);
    if (this.cut) facts.push("cut at the longest answer");
    this.facts.textContent = facts.filter(Boolean).join(" · ");
    if (inView) this.follow();
  }

  #tell(text) {
    this.told += text.length;
    if (text.trim()) this.page.announce(text.trim());
  }
}
