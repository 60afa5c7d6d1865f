// The page: which models there are, the key, the tabs; the panels do the rest.

import { Failure, access, json } from "./api.js";
import { AskPanel } from "./ask.js";
import { ClassifyPanel } from "./classify.js";
import { Tray } from "./pictures.js";
import { SearchPanel } from "./search.js";

const at = (id) => document.getElementById(id);

const page = {
  /** To a screen reader, when it has time. */
  announce(text) {
    at("announcer").textContent = "";
    setTimeout(() => { at("announcer").textContent = text; }, 50); // a change, even where the text is the same
  },
  askForKey(error) {
    at("key-why").textContent = error ? error.sentence : "This endpoint needs an API key.";
    at("key-form").hidden = false;
    showKeyButton();
    at("key").focus();
  },
};
page.tray = new Tray(page.announce, complain);
const panels = {
  ask: new AskPanel(at("panel-ask"), page),
  classify: new ClassifyPanel(at("panel-classify"), page),
  search: new SearchPanel(at("panel-search"), page),
};

function complain(error) {
  if (error instanceof Error && !(error instanceof Failure)) throw error;
  at("trouble").textContent = error ? error.sentence : "";
}

// --------------------------------------------------------------------------------------------------- the models

class Model {
  constructor(id, facts, home) {
    Object.assign(this, { id, label: id, kind: facts.kind, routes: facts.routes, base: new URL("v1/", home).href });
  }

  url(route) {
    return this.base + route;
  }

  serves(route) {
    return this.routes.includes(`/v1/${route}`);
  }
}

/** The models below one address; those of an endpoint that does not answer are missing, and that is told. */
async function modelsAt(home) {
  const { data } = await json(new URL("v1/models", home));
  return data.map(({ id, fmray }) => new Model(id, fmray, home));
}

/** What can be searched: the indexes of every address that has a model for them. */
async function indexesOf(models) {
  const bases = new Map(models.filter((model) => model.kind === "clip").map((model) => [model.base, model]));
  const lists = await Promise.all([...bases].map(async ([base, model]) => {
    const { data } = await json(`${base}indexes`);
    return data.map(({ id, count }) => Object.assign(Object.create(model), { index: id, label: `${id} (${count.toLocaleString()} pictures)` }));
  }));
  return lists.flat();
}

async function load(bases) {
  const folders = bases.map((base) => (base && !base.endsWith("/") ? `${base}/` : base || "./")); // "": this endpoint
  const homes = [...new Set(folders.map((folder) => new URL(folder, document.baseURI).href))];
  const answers = await Promise.allSettled(homes.map(modelsAt));
  const failed = answers.filter((answer) => answer.status === "rejected").map((answer) => answer.reason);
  const refused = failed.find((error) => error.status === 401);
  if (refused) {
    page.askForKey(access.known ? refused : null);
    return;
  }
  const models = answers.flatMap((answer) => answer.value ?? []);
  for (const model of models) {
    if (models.some((other) => other !== model && other.id === model.id)) model.label = `${model.id} at ${new URL("..", model.base).pathname}`;
  }
  complain(failed[0] ?? null);
  at("key-form").hidden = true;
  showKeyButton();
  await offer(models);
}

async function offer(models) {
  panels.ask.offer(models.filter((model) => model.serves("chat/completions")));
  panels.classify.offer(models.filter((model) => model.serves("classify")));
  panels.search.offer(await indexesOf(models).catch((error) => { complain(error); return []; }));
  const shown = Object.keys(panels).filter((name) => panels[name].models.length);
  for (const name of Object.keys(panels)) at(`tab-${name}`).hidden = !shown.includes(name);
  at("served").textContent = models.length === 1 ? `serves ${models[0].label}` : `serves ${models.length} models`;
  at("work").hidden = !shown.length;
  if (shown.length) showTab(shown.includes(location.hash.slice(1)) ? location.hash.slice(1) : shown[0]);
  else if (!at("trouble").textContent) complain(new Failure("this endpoint serves no model that this page can use"));
}

// -------------------------------------------------------------------------------------------------------- tabs

const tabs = () => [...document.querySelectorAll("[role=tab]:not([hidden])")];

function showTab(name, focus = false) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    at(tab.getAttribute("aria-controls")).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
}

document.querySelector("[role=tablist]").addEventListener("click", (event) => {
  const tab = event.target.closest("[role=tab]");
  if (!tab) return;
  showTab(tab.id.slice(4));
  history.replaceState(null, "", `#${tab.id.slice(4)}`);
});

document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const all = tabs();
  const place = all.indexOf(document.activeElement);
  const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: -1 }[event.key];
  if (next === undefined || place < 0) return;
  event.preventDefault();
  showTab(all.at(next % all.length).id.slice(4), true);
});

// ----------------------------------------------------------------------------------------------------- the key

let endpoint = { bases: [""], key: false };

function showKeyButton() {
  at("key-button").hidden = !endpoint.key && !access.known;
  at("key-button").setAttribute("aria-expanded", String(!at("key-form").hidden));
  at("key-forget").hidden = !access.known;
}

at("key-button").addEventListener("click", () => {
  at("key-form").hidden = !at("key-form").hidden;
  showKeyButton();
  if (!at("key-form").hidden) at("key").focus();
});

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  access.use(at("key").value, at("key-keep").checked);
  at("key").value = "";
  begin();
});

at("key-forget").addEventListener("click", () => {
  access.use("", false);
  at("work").hidden = true;
  at("served").textContent = "";
  page.askForKey(null);
});

// --------------------------------------------------------------------------------------------------------- start

async function begin() {
  try {
    endpoint = await json(new URL("page/endpoint.json", document.baseURI));
    if (endpoint.key && !access.known) page.askForKey(null);
    else await load(endpoint.bases);
  } catch (error) {
    complain(error);
  }
}

begin();
