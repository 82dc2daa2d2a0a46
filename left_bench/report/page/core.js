// What every part of the page uses: the data, making elements, what is shown now, copying.

const ABSENT = "\u2013";
const SVG = "http://www.w3.org/2000/svg"; // the name of a namespace; nothing is fetched from it
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 7;

const byId = (id) => document.getElementById(id);
/** The text that stands behind a number in the data. */
const say = (index) => (index === null || index === undefined ? ABSENT : data.strings[index]);
const metricOf = (name) => data.metrics.find((metric) => metric.name === name);
const isOk = (i) => data.ok[i];
/** How a status is shown: all went well, or not. */
const statusClass = (i) => `status ${say(data.status[i]) === "ok" ? "ok" : "failed"}`;

/** An element; whatever is text goes in as text, so nothing from a record is ever read as markup. */
function el(tag, attributes = {}, ...children) {
  return dress(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return dress(document.createElementNS(SVG, tag), attributes, children);
}

/** Attributes by name, listeners where the value is a function; what is null, undefined or false is left out. */
function dress(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** What is shown now; `changed` draws it again. */
const state = {
  query: "",
  chosen: new Map(), // filter key -> set of values; an axis without an entry is not filtered
  sort: null, // { key, descending }
  page: 0,
  shown: new Set(window.innerWidth > 640 ? data.shown : data.main), // a phone has room for three metrics
  axes: data.axes.length > 1 && window.innerWidth > 640, // a phone has the names, which say the same
  scatter: { x: null, y: null, logX: false, logY: false, colour: null },
  along: { metric: null, over: null }, // quality along training: what, and over what
};
let view = []; // the rows that pass the filters, in the order of the table

const redraws = [];
const plotRedraws = [];
const AT_ONCE = 1000; // cells up to which the plots keep up with typing
let plotsDue = null;
/** Draw again; with `filtered`, choose and sort the rows anew. The plots of very many cells follow when typing pauses. */
function changed({ filtered = true } = {}) {
  if (filtered) view = sorted(passing());
  for (const redraw of redraws) redraw();
  keepAddress();
  clearTimeout(plotsDue);
  const drawPlots = () => { for (const redraw of plotRedraws) redraw(); };
  if (data.cells <= AT_ONCE) drawPlots();
  else plotsDue = setTimeout(drawPlots, 150);
}

// filters: every axis, and the status
const rowNumbers = Array.from({ length: data.cells }, (_, i) => i);
const filters = [
  ...data.axes
    .filter((axis) => say(axis.key) !== "cell")
    .map((axis) => ({ key: `axis ${say(axis.key)}`, heading: say(axis.heading), values: axis.values })),
  { key: "status", heading: "status", values: data.status },
  ...(data.pareto ? [{ key: "pareto", heading: "Pareto set", values: data.pareto }] : []),
].filter((filter) => new Set(filter.values).size > 1);

let haystacks = null;
function haystack(i) {
  haystacks ??= rowNumbers.map((row) =>
    [data.labels[row], data.ids[row], data.status[row], data.reasons[row], ...data.axes.map((axis) => axis.values[row])]
      .map((index) => (index === null ? "" : say(index)))
      .join("\n")
      .toLowerCase(),
  );
  return haystacks[i];
}

function passing() {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  const active = filters.filter((filter) => state.chosen.has(filter.key));
  return rowNumbers.filter(
    (i) =>
      active.every((filter) => state.chosen.get(filter.key).has(filter.values[i])) &&
      words.every((word) => haystack(i).includes(word)),
  );
}

const collator = new Intl.Collator("en", { numeric: true });

/** The rows in the order asked for; rows without a value come last, and equal ones keep their order. */
function sorted(rows) {
  const column = state.sort && columns().find((one) => one.key === state.sort.key);
  if (!column) return rows;
  const sign = state.sort.descending ? -1 : 1;
  const { numbers, groups } = column.metric ?? column;
  if (!numbers) return [...rows].sort((a, b) => sign * collator.compare(column.text(a), column.text(b)) || a - b);
  const group = (i) => groups?.[i] ?? (groups ? Infinity : 0);
  return [...rows].sort(
    (a, b) =>
      (numbers[a] === null) - (numbers[b] === null) ||
      // what different yardsticks measured is not ranked together
      (group(a) === group(b) ? 0 : group(a) < group(b) ? -1 : 1) ||
      (numbers[a] === null ? 0 : sign * (numbers[a] - numbers[b])) ||
      a - b,
  );
}

function copyButton(text, name = "Copy command") {
  const button = el("button", { type: "button", class: "copy", click: () => copy(text, button, name) }, name);
  return button;
}

async function copy(text, button, name) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    // no clipboard for this page (an old browser, or a page from a folder): select the text and ask the old way
    const area = el("textarea", { readonly: true, class: "aside", "aria-hidden": "true" });
    area.value = text;
    (button.closest("dialog") ?? document.body).append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = done ? "Copied" : "Could not copy";
  setTimeout(() => { button.textContent = name; }, 1500);
}

/** A metric of one cell with its error, as one text. */
function numberText(metric, i) {
  if (metric.texts[i] === null) return ABSENT;
  const error = metric.error_texts?.[i] ?? null;
  return say(metric.texts[i]) + (error === null ? "" : ` ± ${say(error)}`);
}
