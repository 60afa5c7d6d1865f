// Which of your labels fits each picture: bars with probabilities.

import { Failure, json } from "./api.js";
import { withPictures } from "./snippets.js";
import { Panel, element } from "./panel.js";

const at = (id) => document.getElementById(id);
const SHOWN = 20;

export class ClassifyPanel extends Panel {
  get labels() {
    return [...new Set(at("labels").value.split(/[,\n]/).map((label) => label.trim()).filter(Boolean))];
  }

  current() {
    const { pictures } = this.page.tray;
    const body = { model: this.model.id, input: pictures, labels: this.labels, template: at("template").value, top_k: SHOWN };
    if (at("multi").checked) body.multi_label = true;
    return { model: this.model, route: "classify", body };
  }

  async work({ signal, waiting }) {
    const pictures = [...this.page.tray.pictures];
    if (!pictures.length) throw new Failure("choose a picture first");
    if (!this.labels.length) {
      at("labels").focus();
      throw new Failure("write some labels first");
    }
    const { model, route, body } = this.current();
    const sent = withPictures(body, (picture) => picture.data);
    const reply = await json(model.url(route), { body: sent, signal, waiting });
    const place = this.root.querySelector(".results");
    place.replaceChildren(...reply.data.map((found) => result(pictures[found.index], found.probs)));
    requestAnimationFrame(() => {
      for (const bar of place.querySelectorAll(".bar span")) bar.style.width = bar.dataset.share;
    });
    const told = reply.data.map((found) => `${pictures[found.index].name}: ${found.label}, ${percent(found.probs[0].score)}`);
    this.page.announce(told.join("; "));
  }
}

function result(picture, probs) {
  const bars = probs.map(({ label, score }) => {
    const bar = element("span");
    bar.dataset.share = `${100 * score}%`;
    bar.style.width = "0";
    const line = element("span", { className: "bar" }, bar);
    line.setAttribute("aria-hidden", "true");
    return element("li", {}, element("span", { textContent: label }), element("span", { className: "share", textContent: percent(score) }), line);
  });
  const text = element("div", {}, element("h3", { textContent: picture.name }), element("ol", { className: "bars" }, ...bars));
  return element("article", { className: "result" }, element("img", { src: picture.url, alt: "" }), text);
}

function percent(score) {
  const share = 100 * score;
  return `${share.toFixed(share > 0 && share < 10 ? 1 : 0)} %`;
}
