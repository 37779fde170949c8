// What stands on nodes: what a loader's file holds, with the picture beside it, what a run did or is doing, and the
// warnings of the pack, wherever they arise. A file that is dropped on the canvas becomes its loader.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const WIDGET = "conceptsplit_said";
const PICTURE = "conceptsplit_picture";
// Which input names a loader's file, and the kind that the server knows it by.
const FILES = { ConceptSplitLoader: ["adapter", "adapter"], ConceptSplitLoraLoader: ["lora", "lora"] };

/** Lines of text in a field below the node's inputs; none removes it. The field is no input and is not saved. */
function show(node, said) {
  const lines = [...new Set(said)]; // a node that runs once per value of a list says the same each time
  const text = lines.join("\n");
  let widget = node.widgets?.find((one) => one.name === WIDGET);
  if (!text) return remove(node, widget);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app).widget;
    widget.label = " ";
    widget.options.read_only = true;
    widget.options.serialize = false;
    widget.serialize = false;
    widget.serializeValue = () => undefined;
    if (widget.inputEl) {
      widget.inputEl.readOnly = true;
      widget.inputEl.style.opacity = 0.8;
    }
    // A field that is only read takes no link.
    const socket = node.inputs?.findIndex((one) => one.widget?.name === WIDGET) ?? -1;
    if (socket >= 0) node.removeInput(socket);
  }
  // About 45 signs of the field's font stand in a node's width.
  const rows = lines.reduce((sum, line) => sum + Math.ceil(line.length / 45), 0);
  widget.options.getMinHeight = () => Math.min(14 * rows + 16, 180);
  widget.value = text;
  grow(node);
}

/** A picture below the node's inputs; no address removes it. */
function showPicture(node, address) {
  let widget = node.widgets?.find((one) => one.name === PICTURE);
  if (!address) return remove(node, widget);
  if (!widget) {
    const picture = document.createElement("img");
    picture.style.objectFit = "contain";
    const options = { serialize: false, getMinHeight: () => 128, getMaxHeight: () => 256 };
    widget = node.addDOMWidget(PICTURE, "picture", picture, options);
    widget.serialize = false;
  }
  widget.element.src = api.apiURL(address);
  grow(node);
}

function remove(node, widget) {
  if (!widget) return;
  widget.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  node.setDirtyCanvas(true, true);
}

function grow(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  node.setDirtyCanvas(true, true);
}

/** Every node that stands for an id of a run: "12:3" is node 3 inside the subgraph of node 12, and both are shown. */
function nodesOf(id) {
  const found = [];
  let graph = app.rootGraph ?? app.graph;
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    if (!node) break;
    found.push(node);
    graph = node.subgraph;
  }
  return found;
}

async function showFile(node, [input, kind]) {
  const name = node.widgets?.find((one) => one.name === input)?.value;
  if (!name) return;
  const answer = await api.fetchApi(`/conceptsplit/file?${new URLSearchParams({ kind, name })}`);
  if (!answer.ok) return;
  const { line, picture } = await answer.json();
  show(node, [line]);
  showPicture(node, picture);
}

function watchFile(node) {
  const file = FILES[node.comfyClass];
  const widget = file && node.widgets?.find((one) => one.name === file[0]);
  if (!widget) return;
  const changed = widget.callback;
  widget.callback = function () {
    changed?.apply(this, arguments);
    showFile(node, file);
  };
  setTimeout(() => showFile(node, file), 0); // after a saved workflow has put its values in
}

/** Loaders for the dropped files that stand in a loader's list; other files are left to the host. */
function dropped(event) {
  const made = [];
  for (const file of event.dataTransfer?.files ?? []) {
    for (const [type, [input]] of file.name.endsWith(".safetensors") ? Object.entries(FILES) : []) {
      const node = LiteGraph.createNode(type);
      const widget = node?.widgets?.find((one) => one.name === input);
      const name = widget?.options.values.find?.((one) => one.split(/[\\/]/).pop() === file.name);
      if (!name) continue;
      widget.value = name;
      made.push(node);
      break;
    }
  }
  if (!made.length) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  app.canvas.adjustMouseEvent(event);
  made.forEach((node, place) => {
    node.pos = [event.canvasX + 40 * place, event.canvasY + 40 * place];
    app.canvas.graph.add(node);
  });
}

const queued = new Map(); // node of the host to the lines that were known before its run
const warned = new Map(); // and to those of its last run

const showHosts = (node) => show(node, [...(queued.get(node) ?? []), ...(warned.get(node) ?? [])]);

app.registerExtension({
  name: "ConceptSplit.said",
  nodeCreated: watchFile,
  setup() {
    document.addEventListener("drop", dropped, true);
    api.addEventListener("executed", ({ detail }) => {
      const lines = detail.output?.said;
      if (lines) for (const node of nodesOf(detail.node).slice(-1)) show(node, lines);
    });
    api.addEventListener("conceptsplit.queued", ({ detail }) => {
      const before = [...queued.keys()];
      queued.clear();
      for (const [id, lines] of Object.entries(detail.nodes)) for (const node of nodesOf(id)) queued.set(node, lines);
      new Set([...before, ...queued.keys()]).forEach(showHosts);
    });
    api.addEventListener("conceptsplit.said", ({ detail }) => {
      for (const node of nodesOf(detail.node)) {
        warned.set(node, [...(detail.replace ? [] : (warned.get(node) ?? [])), ...detail.lines]);
        showHosts(node);
      }
    });
    api.addEventListener("executing", ({ detail }) => {
      if (detail === null) return;
      for (const node of nodesOf(detail)) if (warned.delete(node)) showHosts(node);
    });
  },
});
