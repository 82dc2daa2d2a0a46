// The view in the page's address, so that it can be kept and sent: what is filtered, sorted, shown and plotted.

const SCATTER_KEYS = ["x", "y", "colour"];
const LOG_KEYS = ["logX", "logY"];
const ALONG_KEYS = { metric: "along", over: "over" }; // the view's own names: what the chart along training shows
let viewIsKnown = false; // until the page has been drawn its defaults are not worth an address

function addressOfView() {
  const told = new URLSearchParams();
  if (state.query) told.set("words", state.query);
  for (const [key, values] of state.chosen) {
    told.append("filter", key);
    for (const value of values) told.append(`only ${key}`, say(value));
  }
  if (state.sort) told.set("sort", `${state.sort.key} ${state.sort.descending ? "down" : "up"}`);
  const shown = data.metrics.filter((metric) => state.shown.has(metric.name)).map((metric) => metric.name);
  if (shown.join() !== firstView.shown) told.set("columns", shown.join());
  if (state.axes !== firstView.axes) told.set("settings", state.axes ? "shown" : "hidden");
  if (state.page) told.set("page", state.page + 1);
  for (const key of [...SCATTER_KEYS, ...LOG_KEYS]) {
    if (String(state.scatter[key]) !== firstView.scatter[key]) told.set(key, state.scatter[key]);
  }
  for (const [key, name] of Object.entries(ALONG_KEYS)) {
    if (state.along[key] !== (firstView.along[key] ?? null)) told.set(name, state.along[key]);
  }
  return told.toString();
}

/** What the page shows without an address; taken once, before one is read. */
const firstView = { shown: data.metrics.filter((metric) => state.shown.has(metric.name)).map((metric) => metric.name).join(), axes: state.axes, scatter: {}, along: {} };

function keepAddress() {
  if (!viewIsKnown) return;
  const told = addressOfView();
  const address = told ? `#${told}` : location.pathname + location.search;
  try {
    history.replaceState(null, "", address);
  } catch {
    // a page in a frame without an origin: the view is not kept
  }
}

/** Take the view from the address; what this page does not have is passed over. */
function readAddress() {
  const told = new URLSearchParams(location.hash.slice(1));
  const numberOf = new Map(data.strings.map((text, index) => [text, index]));
  state.query = told.get("words") ?? "";
  for (const key of told.getAll("filter")) {
    const filter = filters.find((one) => one.key === key);
    if (!filter) continue;
    const known = new Set(filter.values);
    state.chosen.set(key, new Set(told.getAll(`only ${key}`).map((text) => numberOf.get(text)).filter((value) => known.has(value))));
  }
  const columnsAsked = told.get("columns");
  if (columnsAsked !== null) state.shown = new Set(columnsAsked.split(",").filter((name) => metricOf(name)));
  if (told.has("settings")) state.axes = told.get("settings") === "shown";
  const [, key, way] = /^(.+) (down|up)$/.exec(told.get("sort") ?? "") ?? [];
  if (key && columns().some((column) => column.key === key)) state.sort = { key, descending: way === "down" };
  state.page = Math.max(0, (Number.parseInt(told.get("page"), 10) || 1) - 1);
  const { scatter } = state;
  for (const axis of ["x", "y"]) if (metricOf(told.get(axis))) scatter[axis] = told.get(axis);
  if (told.has("colour")) scatter.colour = told.get("colour");
  for (const [key, name] of Object.entries(ALONG_KEYS)) state.along[key] = told.get(name);
  scatter.asked = new Map(LOG_KEYS.filter((log) => told.has(log)).map((log) => [log, told.get(log) === "true"]));
}
