// Shows the text that a report node gives in the node itself, as a box that can be read, scrolled and copied.

import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const BOX = "language_bridge_report";
const REPORTS = new Set([
  "LanguageBridgeInspector",
  "LanguageBridgeLoraReport",
  "LanguageBridgeConvert",
  "LanguageBridgeTrain",
  "LanguageBridgeSave",
  "LanguageBridgeDataset",
  "LanguageBridgeDatasetFromLists",
  "LanguageBridgeDownloads",
  "LanguageBridgeDoctor",
]);

function boxOf(node) {
  const found = node.widgets?.find((widget) => widget.name === BOX);
  if (found) return found;
  const { widget } = ComfyWidgets.STRING(node, BOX, ["STRING", { multiline: true }], app);
  // The text belongs to one run, so neither the saved workflow nor the queued prompt carries it.
  widget.serialize = false;
  widget.options.serialize = false;
  widget.serializeValue = () => undefined;
  widget.label = " ";
  const element = widget.element ?? widget.inputEl;
  if (element) {
    element.readOnly = true;
    element.style.fontFamily = "monospace";
  }
  return widget;
}

app.registerExtension({
  name: "languagebridge.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!REPORTS.has(nodeData.name)) return;
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      executed?.apply(this, arguments);
      const text = output?.text;
      if (!text) return;
      boxOf(this).value = Array.isArray(text) ? text.join("\n") : String(text);
      const [width, height] = this.computeSize();
      this.setSize([Math.max(this.size[0], width, 420), Math.max(this.size[1], height, 560)]);
      this.setDirtyCanvas(true, true);
    };
  },
});
