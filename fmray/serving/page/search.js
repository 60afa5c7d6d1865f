// The indexed pictures nearest to some words, or to the picture that is looked at.

import { Failure, json } from "./api.js";
import { withPictures } from "./snippets.js";
import { Panel, element } from "./panel.js";

const at = (id) => document.getElementById(id);

export class SearchPanel extends Panel {
  choice = "Index";
  how = "text";

  refresh() {
    at("by-picture").disabled = !this.page.tray.chosen;
    super.refresh();
  }

  /** What is searched for: words, or where there are none the chosen picture. */
  get query() {
    const { chosen } = this.page.tray;
    const words = at("query").value.trim();
    return (this.how === "picture" || !words) && chosen ? { image: chosen } : words;
  }

  current() {
    const body = { query: this.query, index: this.model.index, top_k: at("how-many").valueAsNumber || 12, include: ["thumbnails"] };
    if (at("prefix").value) body.filter = { prefix: at("prefix").value };
    return { model: this.model, route: "search", body };
  }

  async work({ signal, waiting, how }) {
    this.how = how || "text";
    if (this.how === "text" && !at("query").value.trim()) {
      at("query").focus();
      throw new Failure("write some words first");
    }
    const { model, route, body } = this.current();
    const sent = withPictures(body, (picture) => picture.data);
    const reply = await json(model.url(route), { body: sent, signal, waiting });
    this.root.querySelector(".hits").replaceChildren(...reply.data.map(hit));
    const count = reply.data.length;
    this.page.announce(count === 1 ? "1 picture found" : `${count} pictures found`);
    this.found = count ? "" : "No picture found.";
  }

  say(text) {
    super.say(text || (this.running ? "" : this.found ?? ""));
  }
}

function hit({ id, caption, score, thumbnail }) {
  const shot = thumbnail
    ? element("img", { className: "shot", src: thumbnail, alt: caption ?? id })
    : element("div", { className: "shot", textContent: "no thumbnail" });
  const facts = element("figcaption", {}, element("span", { textContent: caption ?? id }));
  facts.append(element("br"), element("span", { className: "quiet", textContent: score.toFixed(3), title: `${id}: cosine ${score}` }));
  return element("li", {}, element("figure", {}, shot, facts));
}
