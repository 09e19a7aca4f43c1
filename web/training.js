// Puts the button "Finish now" under the training node: the training ends after its present step, and the graph
// goes on with what was learnt.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "LanguageBridgeTrain";
const LABELS = { en: "Finish now", zh: "\u73b0\u5728\u7ed3\u675f\u8bad\u7ec3" };
const ANSWERS = {
  en: ["Finishing after this step", "No training of this run is under way"],
  zh: ["\u8fd9\u4e00\u6b65\u4e4b\u540e\u7ed3\u675f", "\u8fd9\u4e2a\u540d\u79f0\u6ca1\u6709\u6b63\u5728\u8fdb\u884c\u7684\u8bad\u7ec3"],
};

function language() {
  const chosen = app.ui?.settings?.getSettingValue?.("Comfy.Locale");
  return String(chosen ?? navigator.language ?? "en").startsWith("zh") ? "zh" : "en";
}

async function finish(node) {
  const run = node.widgets?.find((widget) => widget.name === "run")?.value;
  const answer = await api.fetchApi("/language_bridge/finish", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ run: String(run ?? "") }),
  });
  const finishing = answer.ok && (await answer.json()).finishing;
  app.extensionManager?.toast?.add?.({
    severity: finishing ? "success" : "warn",
    summary: ANSWERS[language()][finishing ? 0 : 1],
    life: 4000,
  });
}

app.registerExtension({
  name: "languagebridge.training",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function () {
      created?.apply(this, arguments);
      const button = this.addWidget("button", "finish_now", null, () => finish(this), { serialize: false });
      button.label = LABELS[language()];
      button.serialize = false;
    };
  },
});
