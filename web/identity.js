// Keeps in the graph which bridge a file name means, so that a saved workflow finds it on another machine. The
// server writes the same record into every queued graph; here it also gets into graphs that are only saved.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "LanguageBridge";
const EVENT = "language_bridge.identity";
const OF_GRAPH = "language_bridge"; // records of names that an outer node of a subgraph shows

let records = {}; // file name here -> record, as the server knows them

function widgetsOf(node) {
  const named = (name) => node.widgets?.find((widget) => widget.name === name);
  const [bridge, identity] = [named("bridge"), named("identity")];
  return node.comfyClass === NODE && bridge && identity ? { bridge, identity } : null;
}

function plain(name) {
  return String(name).replaceAll("\\", "/").normalize("NFC");
}

// The record in a text when it is about this file name; one about another name says nothing of it.
function about(name, text) {
  try {
    const record = JSON.parse(text);
    return record && plain(record.bridge) === plain(name) ? record : null;
  } catch {
    return null;
  }
}

function learn(definition) {
  records = definition?.input?.required?.bridge?.[1]?.records ?? {};
}

async function ask() {
  const known = await (await api.fetchApi(`/object_info/${NODE}`)).json();
  learn(known[NODE]);
}

// A graph was opened: the list shows the file that has the wanted content, whatever it is called here.
function settle(node) {
  const found = widgetsOf(node);
  if (!found) return;
  const { bridge, identity } = found;
  const names = Array.isArray(bridge.options?.values) ? bridge.options.values : [];
  const record = about(bridge.value, identity.value);
  if (names.includes(bridge.value)) {
    if (!record) identity.value = records[bridge.value] ?? "";
    return;
  }
  const same = (name) => record?.hash && about(name, records[name])?.hash === record.hash;
  const here = names.find((name) => plain(name) === plain(bridge.value)) ?? names.find(same);
  if (here === undefined) return;
  bridge.value = here;
  // The content that was meant stays written: should the file here have another one, the server will say so.
  identity.value = record
    ? JSON.stringify({ ...record, bridge: plain(here) })
    : (records[here] ?? "");
}

function everyNode() {
  const root = app.rootGraph ?? app.graph;
  const graphs = [root, ...(root?.subgraphs?.values?.() ?? [])];
  return graphs.flatMap((graph) => graph?.nodes ?? []);
}

app.registerExtension({
  name: "languagebridge.identity",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      for (const node of everyNode()) {
        const found = widgetsOf(node);
        const record = found && detail.records[found.bridge.value];
        if (record && !about(found.bridge.value, found.identity.value)) found.identity.value = record;
      }
      for (const note of detail.notes) {
        const toast = { severity: "warn", summary: "Language Bridge", detail: note };
        app.extensionManager?.toast?.add(toast);
      }
    });
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === NODE) learn(nodeData);
  },
  refreshComboInNodes(definitions) {
    learn(definitions[NODE]);
  },
  nodeCreated(node) {
    const found = widgetsOf(node);
    if (!found) return;
    const { bridge, identity } = found;
    identity.hidden = true;
    identity.value = records[bridge.value] ?? "";
    const chosen = bridge.callback;
    bridge.callback = function () {
      // Whoever chooses a file means the file that is there now.
      identity.value = "";
      const name = bridge.value;
      delete (app.rootGraph ?? app.graph)?.extra?.[OF_GRAPH]?.[plain(name)];
      ask()
        .then(() => {
          if (bridge.value === name && !identity.value) identity.value = records[name] ?? "";
        })
        .catch(() => {}); // the server writes it when the graph is queued
      return chosen?.apply(this, arguments);
    };
  },
  loadedGraphNode: settle,
});
