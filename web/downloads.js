// The page's side of the downloads: an order of sources and a list of published weights in the settings, and
// consent that no saved workflow can carry. The buttons queue the nodes Downloads and Doctor, as a graph would:
// the pack adds no route to the server, and nothing is asked before a button is pressed.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const DOWNLOADS = "LanguageBridgeDownloads";
const DOCTOR = "LanguageBridgeDoctor";
const SOURCES = "LanguageBridge.Downloads.Sources";
const SETS = "LanguageBridge.Downloads.Sets";
const FACTS = "language_bridge_sets";
const UNSAVED = new Set(["agree", "trust_first_use"]);
const STEP = "language_bridge";
const POLL_MS = 400;

let say = (name) => name;

async function learnWords() {
  const all = await (await api.fetchApi("/i18n")).json();
  const locale = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  const words = all[locale.startsWith("zh") ? "zh" : "en"]?.languageBridgeDownloads ?? {};
  say = (name, values = {}) =>
    (words[name] ?? name).replace(/\{(\w+)\}/g, (whole, key) => values[key] ?? whole);
}

function made(tag, text = "", style = "") {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (style) element.style.cssText = style;
  return element;
}

function button(text, press) {
  const element = made(
    "button",
    text,
    "padding:2px 10px;border:1px solid var(--border-color);border-radius:6px;cursor:pointer;" +
      "background:var(--comfy-input-bg);color:var(--input-text)",
  );
  element.type = "button";
  element.addEventListener("click", press);
  return element;
}

function link(address) {
  const element = made("a", say("page"), "text-decoration:underline");
  if (!address.startsWith("https://")) return made("span");
  element.href = address;
  element.target = "_blank";
  element.rel = "noopener noreferrer";
  return element;
}

function box(text) {
  const label = made("label", "", "display:flex;gap:6px;align-items:center;cursor:pointer");
  const input = made("input");
  input.type = "checkbox";
  label.append(input, made("span", text));
  return { label, input };
}

function sizeOf(set) {
  if (!set.bytes) return "?";
  const size = `${(set.bytes / 1e9).toFixed(2)} GB`;
  return set.all_sizes_known ? size : say("more", { size });
}

class Panel {
  // One for the page: the settings dialog asks for the element again and again.

  constructor() {
    this.element = made("div", "", "width:min(34rem,60vw);display:flex;flex-direction:column;gap:8px");
    this.element.id = "language-bridge-downloads";
    this.tools = made("div", "", "display:flex;gap:6px;justify-content:flex-end");
    this.body = made("div", "", "max-height:22rem;overflow:auto;font-size:0.85em");
    this.bar = made("progress", "", "width:100%;display:none");
    this.told = made(
      "pre",
      "",
      "white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-size:0.8em;max-height:16rem;overflow:auto",
    );
    this.element.append(this.tools, this.bar, this.told, this.body);
    this.running = null;
    api.addEventListener("progress", ({ detail }) => this.advance(detail));
    this.rest();
  }

  async rest() {
    await learnWords();
    this.tools.replaceChildren(
      button(this.sets ? say("refresh") : say("show"), () => this.show()),
      button(say("doctor"), () => this.run(DOCTOR, { language: "auto", hosts: false })),
    );
  }

  async show() {
    const known = await (await api.fetchApi(`/object_info/${DOWNLOADS}`)).json();
    this.sets = known[DOWNLOADS]?.input?.required?.set?.[1]?.[FACTS] ?? [];
    const table = made("table", "", "width:100%;border-spacing:0 3px;border-collapse:separate");
    for (const set of this.sets) table.append(this.row(set));
    this.body.replaceChildren(table);
    await this.rest();
  }

  row(set) {
    const row = made("tr");
    row.dataset.set = set.name;
    row.dataset.state = set.state;
    const name = made("td", set.name, "overflow-wrap:anywhere");
    name.title = `${set.base || say("tower")} - ${set.licence || say("undeclared")}`;
    const state = made("td", say(set.state), "white-space:nowrap;padding:0 8px;opacity:0.8");
    const does = made("td", "", "text-align:right;white-space:nowrap");
    if (set.state === "by hand") does.append(link(set.card));
    else if (set.state === "here") does.append(button(say("verify"), () => this.queue(set, "verify")));
    else does.append(button(say("get"), () => this.confirm(set)));
    row.append(name, made("td", sizeOf(set), "white-space:nowrap;padding:0 8px"), state, does);
    return row;
  }

  // Before anything is fetched: the size, the licences, and what nobody has verified.
  confirm(set) {
    const form = made("div", "", "display:flex;flex-direction:column;gap:6px");
    form.append(made("b", set.name), made("div", say("size", { size: sizeOf(set) })));
    if (set.reference) {
      form.append(made("div", `${say("reference")} ${set.reference}.`));
      form.append(button(say("close"), () => this.show()));
      this.body.replaceChildren(form);
      return;
    }
    const agree = box(say("agree"));
    const trust = box(say("trust"));
    if (set.asks.length) {
      form.append(made("div", say("needs")));
      for (const one of set.asks) {
        const line = made("div", `${one.name}: ${one.licence || say("undeclared")} `, "padding-left:1em");
        line.append(link(one.card));
        form.append(line);
      }
      form.append(agree.label);
    }
    if (set.trust) form.append(trust.label);
    const buttons = made("div", "", "display:flex;gap:6px");
    buttons.append(
      button(say("fetch"), () => this.queue(set, "get", agree.input.checked, trust.input.checked)),
      button(say("close"), () => this.show()),
    );
    form.append(buttons);
    this.body.replaceChildren(form);
  }

  queue(set, action, agree = false, trust = false) {
    const order = app.extensionManager.setting.get(SOURCES) ?? "usual";
    return this.run(DOWNLOADS, {
      set: set.name,
      action,
      sources: order === "usual" ? "as set" : order,
      reference: "none",
      precision: "as published",
      clean: false,
      again: false,
      language: "auto",
      agree,
      trust_first_use: trust,
    });
  }

  async run(type, inputs) {
    if (this.running) return;
    this.running = "";
    this.body.style.display = "none";
    this.told.textContent = say("working");
    this.tools.replaceChildren(button(say("cancel"), () => this.stop()));
    try {
      const answer = await this.post("/prompt", { prompt: { [STEP]: { class_type: type, inputs } } });
      const told = await answer.json();
      if (!answer.ok) throw new Error(say("lost") + refusal(told));
      this.running = told.prompt_id;
      this.told.textContent = await this.outcome(told.prompt_id);
    } catch (error) {
      this.told.textContent = error.message;
    }
    this.running = null;
    this.bar.style.display = "none";
    this.body.style.display = "";
    if (this.sets) await this.show();
    else await this.rest();
  }

  // The history is asked, not the socket: it also answers after a lost connection.
  async outcome(id) {
    for (;;) {
      await new Promise((done) => setTimeout(done, POLL_MS));
      const answer = await api.fetchApi(`/history/${id}`).catch(() => null);
      const entry = answer?.ok ? (await answer.json())[id] : null;
      if (this.dropped === id) return say("stopped");
      if (!entry) continue;
      if (entry.status?.status_str === "success") return (entry.outputs?.[STEP]?.text ?? [say("done")]).join("\n");
      const messages = Object.fromEntries(entry.status?.messages ?? []);
      if (messages.execution_interrupted) return say("stopped");
      return `${say("failed")}\n${messages.execution_error?.exception_message ?? ""}`;
    }
  }

  advance({ prompt_id: id, value, max }) {
    if (!this.running || id !== this.running) return;
    this.bar.style.display = "";
    this.bar.max = max;
    this.bar.value = value;
    if (max > 1e5) this.told.textContent = `${(value / 1e6).toFixed(1)} / ${(max / 1e6).toFixed(1)} MB`;
  }

  async stop() {
    const id = this.running;
    if (!id) return;
    const queue = await (await api.fetchApi("/queue")).json();
    if (queue.queue_pending.some((item) => item[1] === id)) {
      await this.post("/queue", { delete: [id] });
      this.dropped = id;
    }
    await this.post("/interrupt", { prompt_id: id });
  }

  post(path, body) {
    const headers = { "Content-Type": "application/json" };
    return api.fetchApi(path, { method: "POST", headers, body: JSON.stringify(body) });
  }
}

function refusal(told) {
  const details = Object.values(told.node_errors ?? {}).flatMap((node) => node.errors ?? []);
  return [told.error?.message, ...details.map((one) => `${one.message}: ${one.details}`)].join(" ");
}

let panel = null;

app.registerExtension({
  name: "languagebridge.downloads",
  settings: [
    {
      id: SETS,
      category: ["Language Bridge", "Downloads", "Sets"],
      name: "Published weights",
      type: () => (panel ??= new Panel()).element,
      defaultValue: "",
    },
    {
      id: SOURCES,
      category: ["Language Bridge", "Downloads", "Sources"],
      name: "Download sources",
      type: "combo",
      defaultValue: "usual",
      options: [
        { text: "usual order", value: "usual" },
        { text: "Hub first", value: "hub,mirror,modelscope" },
        { text: "mirror first", value: "mirror,modelscope,hub" },
        { text: "ModelScope first", value: "modelscope,mirror,hub" },
        { text: "never the Hub", value: "mirror,modelscope" },
        { text: "Hub alone", value: "hub" },
      ],
    },
  ],
  nodeCreated(node) {
    if (node.comfyClass !== DOWNLOADS) return;
    const own = (node.widgets ?? []).filter((widget) => UNSAVED.has(widget.name));
    for (const widget of own) widget.serialize = false; // not in the saved workflow; in the queued prompt it is
    // Whoever loads a graph, also one in the API's form, sets its values at once: what they set is taken back.
    setTimeout(() => own.forEach((widget) => (widget.value = false)), 0);
  },
});
