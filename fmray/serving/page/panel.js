// What the three panels share: a form that runs and can be stopped, a choice of model, its request as code.

import { Failure, access } from "./api.js";
import * as snippets from "./snippets.js";

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A panel of the page. A subclass has `models`, `async work({ signal, waiting, how })` and `current()`: route and body. */
export class Panel {
  choice = "Model";

  constructor(root, page) {
    this.root = root;
    this.page = page;
    this.form = root.querySelector("form");
    this.stop = root.querySelector(".stop");
    this.running = null;
    this.models = [];
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run(event.submitter?.value ?? "");
    });
    this.stop.addEventListener("click", () => this.running?.abort());
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running) this.running.abort();
    });
    root.addEventListener("input", () => this.refresh());
    page.tray.addEventListener("change", () => this.refresh());
    this.#code();
  }

  get model() {
    return this.models[Number(this.select?.value ?? 0)];
  }

  /** Offer these models; without any the panel is not shown. */
  offer(models) {
    this.models = models;
    const place = this.form.querySelector(".model");
    this.select = null;
    if (models.length > 1) {
      this.select = element("select", { id: `${this.root.id}-model` });
      this.select.append(...models.map((model, i) => element("option", { value: i, textContent: model.label })));
      this.select.addEventListener("change", () => this.changedModel());
      place.replaceChildren(element("label", { htmlFor: this.select.id, textContent: this.choice }), this.select);
    } else {
      place.replaceChildren(models.length ? `${this.choice} ${models[0].label}` : "");
    }
    this.changedModel();
  }

  changedModel() {
    this.refresh();
  }

  refresh() {
    this.showCode?.();
  }

  // -------------------------------------------------------------------------------------------------- a request

  async #run(how) {
    if (this.running) return;
    const running = new AbortController();
    this.running = running;
    this.say("");
    this.complain(null);
    this.#busy(true);
    const waiting = (left) => {
      if (left && !this.told) this.page.announce(`The endpoint is busy; trying again in ${left} seconds`);
      this.told = left > 0;
      this.say(left ? `The endpoint is busy. Trying again in ${left} s …` : "Trying again …");
    };
    try {
      await this.work({ signal: running.signal, waiting, how });
      this.say("");
    } catch (error) {
      this.say("");
      if (running.signal.aborted) this.stopped();
      else this.complain(error);
    } finally {
      this.running = null;
      this.#busy(false);
      this.refresh();
    }
  }

  #busy(busy) {
    const focused = document.activeElement === this.stop;
    this.stop.hidden = !busy;
    this.root.setAttribute("aria-busy", String(busy));
    for (const button of this.form.querySelectorAll("[type=submit]")) button.setAttribute("aria-disabled", String(busy));
    if (!busy && focused) this.form.querySelector("textarea, input").focus();
  }

  stopped() {
    this.say("Stopped.");
    this.page.announce("Stopped");
  }

  say(text) {
    this.form.querySelector(".status").textContent = text;
  }

  complain(error) {
    const place = this.form.querySelector(".error");
    if (error === null) place.textContent = "";
    else if (error instanceof Failure && error.status === 401) this.page.askForKey(error);
    else if (error instanceof Failure) place.textContent = error.sentence;
    else throw error; // our own mistake belongs on the console
  }

  // ------------------------------------------------------------------------------------------------ its snippet

  #code() {
    const details = this.root.querySelector(".code");
    const pre = element("pre", { tabIndex: 0 });
    pre.setAttribute("aria-label", "The request as code");
    pre.setAttribute("role", "region");
    const ways = [["curl", snippets.curl], ["Python", snippets.python]];
    let way = 0;
    const buttons = ways.map(([name], i) => element("button", { type: "button", textContent: name, onclick: () => { way = i; this.showCode(); } }));
    const copy = element("button", { type: "button", textContent: "Copy", className: "plain" });
    copy.addEventListener("click", () => this.#copy(pre));
    details.append(element("summary", { textContent: "This request as code" }), element("div", { className: "row" }, ...buttons, copy), pre);
    this.showCode = () => {
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === way)));
      if (!details.open || !this.models.length) return;
      const { model, route, body } = this.current();
      pre.textContent = ways[way][1](model.base, route, body, access.known);
    };
    details.addEventListener("toggle", this.showCode);
  }

  async #copy(pre) {
    try {
      await navigator.clipboard.writeText(pre.textContent);
      this.page.announce("Copied");
    } catch { // not allowed here (http, a policy): the text is selected, so that a key copies it
      getSelection().selectAllChildren(pre);
      this.page.announce("Selected; copy it with your keyboard");
    }
  }
}
