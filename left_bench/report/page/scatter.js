// Any metric against any other: a point for every ok cell that has both, and the front that no cell beats.

const MAX_POINTS = 1500;
const MAX_LABELLED = 60;
const MAX_BARRED = 200;
const LOG_FROM = 30; // the ratio of largest to smallest from which an axis is logarithmic unless asked otherwise
const RADIUS = 6;
const SHAPES = [
  "M-5.3,0A5.3,5.3 0 1 0 5.3,0A5.3,5.3 0 1 0 -5.3,0Z", // circle
  "M-4.8,-4.8H4.8V4.8H-4.8Z", // square
  "M0,-6.2L5.9,4.6H-5.9Z", // triangle
  "M0,-6.6L6,0L0,6.6L-6,0Z", // diamond
  "M0,6.2L5.9,-4.6H-5.9Z", // triangle on its head
  "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z", // plus
  "M-5.5,-3.3L-3.3,-5.5L0,-2.2L3.3,-5.5L5.5,-3.3L2.2,0L5.5,3.3L3.3,5.5L0,2.2L-3.3,5.5L-5.5,3.3L-2.2,0Z", // cross
  "M-6.2,0L4.6,-5.9V5.9Z", // triangle to the left
  "M6.2,0L-4.6,-5.9V5.9Z", // triangle to the right
  "M0,-6.6L1.6,-2.1L6.3,-2L2.5,0.8L3.9,5.3L0,2.6L-3.9,5.3L-2.5,0.8L-6.3,-2L-1.6,-2.1Z", // star
  "M0,-6L5.7,-1.9L3.5,4.9H-3.5L-5.7,-1.9Z", // pentagon
]; // in the order of report/styles.py
const styleOf = ([colour, shape]) => ({ path: SHAPES[shape], colour: `c${colour}` });
const markOf = (n) => ({ path: SHAPES[n % SHAPES.length], colour: `c${n % COLOURS}` });

const axisName = (metric) =>
  metric.unit && !metric.heading.includes(metric.unit) ? `${metric.heading} (${metric.unit})` : metric.heading;
const better = (metric, lower, higher) => (metric.better === "none" ? "" : `, ${metric.better === "lower" ? lower : higher} is better`);

/** From numbers to pixels, and where the grid lines are. */
function makeScale(values, { log, from, to, steps }) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const pixels = (share) => from + share * (to - from);
  if (log) {
    [low, high] = low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.06, high * (high / low) ** 0.06];
    const span = Math.log(high / low);
    const decades = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) decades.push(10 ** power);
    let ticks = [];
    for (const factors of [[1], [1, 3], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
      ticks = decades.flatMap((decade) => factors.map((factor) => factor * decade)).filter((tick) => tick >= low && tick <= high);
      if (ticks.length >= Math.min(3, steps)) break;
    }
    while (ticks.length > steps + 1) ticks = ticks.filter((_, i) => i % 2 === 0);
    return { at: (value) => pixels(Math.log(value / low) / span), ticks };
  }
  const margin = (high - low || Math.abs(high) || 1) * 0.07;
  // nothing measured here is negative unless it is: an axis does not begin below zero to make room
  [low, high] = [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
  const rough = (high - low) / steps;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 2.5, 5, 10].find((factor) => unit * factor >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n += 1) ticks.push(n * step);
  return { at: (value) => pixels((value - low) / (high - low)), ticks };
}

const tickText = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });

/** The rows that no other beats in both metrics, along x; none where they may not be ranked together. */
function paretoFront(rows, x, y) {
  const ranked = (metric) => metric.better !== "none" && !(metric.groups && new Set(rows.map((i) => metric.groups[i])).size > 1);
  if (x === y || !ranked(x) || !ranked(y)) return [];
  const cost = (metric) => (i) => (metric.better === "lower" ? 1 : -1) * metric.numbers[i];
  const [a, b] = [cost(x), cost(y)];
  const order = [...rows].sort((i, j) => a(i) - a(j) || b(i) - b(j) || i - j);
  const front = [];
  let least = Infinity; // the least cost in y of all rows that cost less in x
  for (let start = 0; start < order.length; ) {
    let end = start;
    while (end < order.length && a(order[end]) === a(order[start])) end += 1;
    const lowest = b(order[start]);
    if (lowest < least) {
      front.push(...order.slice(start, end).filter((i) => b(i) === lowest));
      least = lowest;
    }
    start = end;
  }
  return front;
}

function drawScatterControls(section) {
  const choice = (id, name, options, value, change) => {
    const select = el("select", { id, change: () => change(select.value) }, options.map(([key, text]) => el("option", { value: key }, text)));
    select.value = value;
    return el("label", {}, name, select);
  };
  const numeric = data.metrics.filter((metric) => rowNumbers.some((i) => isOk(i) && metric.numbers[i] !== null));
  if (!numeric.length) return false;
  const names = numeric.map((metric) => [metric.name, metric.heading]);
  const known = (name, otherwise) => (numeric.some((metric) => metric.name === name) ? name : otherwise.name);
  const { scatter } = state;
  const asked = { ...scatter };
  scatter.x = known("peak_memory_bytes", numeric.at(-1));
  scatter.y = known(data.main[0], numeric[0]);
  const colours = filters.filter((filter) => filter.key !== "status");
  scatter.colour = (colours.find((filter) => filter.key === "axis peft") ?? colours[0])?.key ?? "";
  Object.assign(firstView.scatter, { x: scatter.x, y: scatter.y, colour: scatter.colour, logX: String(wantsLog(scatter.x)), logY: String(wantsLog(scatter.y)) });
  scatter.x = known(asked.x, metricOf(scatter.x));
  scatter.y = known(asked.y, metricOf(scatter.y));
  if (asked.colour === "" || colours.some((filter) => filter.key === asked.colour)) scatter.colour = asked.colour;
  const logBox = (id, name, key) => {
    const box = el("input", { type: "checkbox", id, change: () => { scatter[key] = box.checked; drawScatter(); keepAddress(); } });
    return el("label", { class: "check" }, box, name);
  };
  const swap = (axis, log) => (value) => {
    scatter[axis] = value;
    scatter[log] = wantsLog(value);
    byId(axis === "x" ? "log-x" : "log-y").checked = scatter[log];
    drawScatter();
    keepAddress();
  };
  section.append(
    el("h2", {}, "One metric against another"),
    el("div", { class: "axes" },
      choice("scatter-x", "across", names, scatter.x, swap("x", "logX")),
      logBox("log-x", "log", "logX"),
      choice("scatter-y", "up", names, scatter.y, swap("y", "logY")),
      logBox("log-y", "log", "logY"),
      choice("scatter-colour", "colour and shape", [...colours.map((filter) => [filter.key, filter.heading]), ["", "all alike"]], scatter.colour,
        (value) => { scatter.colour = value; drawScatter(); keepAddress(); })),
    el("div", { class: "chart", id: "scatter" }),
    el("ul", { class: "legend", id: "scatter-legend", "aria-label": "Legend" }),
    el("p", { class: "hint", id: "scatter-note" }),
  );
  for (const [axis, log] of [["x", "logX"], ["y", "logY"]]) {
    scatter[log] = scatter.asked?.get(log) ?? wantsLog(scatter[axis]);
    byId(axis === "x" ? "log-x" : "log-y").checked = scatter[log];
  }
  plotRedraws.push(drawScatter);
  whenResized(byId("scatter"), drawScatter);
  return true;
}

function wantsLog(name) {
  const values = rowNumbers.filter(isOk).map((i) => metricOf(name).numbers[i]).filter((value) => value !== null);
  // a share between nothing and one is read on a plain axis
  return metricOf(name).kind !== "quality" && values.length > 1 && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= LOG_FROM;
}

function drawScatter() {
  const [x, y] = [metricOf(state.scatter.x), metricOf(state.scatter.y)];
  const chart = byId("scatter");
  hideTip();
  const having = view.filter((i) => isOk(i) && x.numbers[i] !== null && y.numbers[i] !== null);
  const [logX, logY] = [state.scatter.logX && having.every((i) => x.numbers[i] > 0), state.scatter.logY && having.every((i) => y.numbers[i] > 0)];
  const front = paretoFront(having, x, y);
  const onFront = new Set(front);
  const members = view.length < data.cells ? null : paretoSet(x.name, y.name);
  const outlined = members ?? onFront;
  const drawn = [...front, ...having.filter((i) => !onFront.has(i))].slice(0, MAX_POINTS);
  const kinds = colouring(drawn);
  if (!drawn.length) {
    chart.replaceChildren(el("p", { class: "hint" }, "No cell that passes the filters is ok and has both metrics."), byId("tip"));
    byId("scatter-note").textContent = "";
    return;
  }
  const width = Math.max(280, chart.clientWidth - 14);
  const height = Math.round(Math.min(460, Math.max(300, width * 0.6)));
  const value = { x: (i) => x.numbers[i] / x.scale, y: (i) => y.numbers[i] / y.scale };
  const reach = (metric, axis) => (i, sign) => value[axis](i) + (sign * (metric.errors?.[i] ?? 0)) / metric.scale;
  const [reachX, reachY] = [reach(x, "x"), reach(y, "y")];
  const bars = drawn.length <= MAX_BARRED ? drawn.filter((i) => y.errors?.[i] || x.errors?.[i]) : [];
  noteScatter(having, drawn, { front, members, bars, refused: [logX !== state.scatter.logX, logY !== state.scatter.logY] });
  const ends = (of, reached, log) => [...drawn.map(of), ...bars.flatMap((i) => [reached(i, 1), reached(i, -1)])].filter((end) => !log || end > 0);
  const down = makeScale(ends(value.y, reachY, logY), { log: logY, from: height - 42, to: 30, steps: 6 });
  const left = 14 + 6.6 * Math.max(...down.ticks.map((tick) => tickText(tick).length));
  const across = makeScale(ends(value.x, reachX, logX), { log: logX, from: left, to: width - 12, steps: Math.max(2, Math.floor(width / 85)) });
  const place = new Map(drawn.map((i) => [i, { x: across.at(value.x(i)), y: down.at(value.y(i)) }]));
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": `${y.heading} against ${x.heading}: ${drawn.length} cells; the arrow keys go from one to the next` },
    ...frame({ across, down, left, width, height }),
    svg("text", { x: 4, y: 14 }, `↑ ${axisName(y)}${logY ? ", log" : ""}${better(y, "down", "up")}`),
    svg("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, `${axisName(x)}${logX ? ", log" : ""}${better(x, "left", "right")} →`),
    ...(front.length > 1 ? [svg("path", { class: "front", d: stair(front.map((i) => place.get(i))) })] : []),
    ...bars.map((i) => errorBars(place.get(i),
      [-1, 1].map((sign) => (logX && reachX(i, sign) <= 0 ? place.get(i).x : across.at(reachX(i, sign)))),
      [-1, 1].map((sign) => (logY && reachY(i, sign) <= 0 ? place.get(i).y : down.at(reachY(i, sign)))))),
  );
  const order = [...drawn].sort((a, b) => place.get(a).x - place.get(b).x || place.get(a).y - place.get(b).y);
  const marks = new Map();
  // outlined ones are drawn last, so that they lie on top
  for (const i of [...order.filter((i) => !outlined.has(i)), ...order.filter((i) => outlined.has(i))]) {
    const mark = scatterPoint(i, { x, y, kinds, best: outlined.has(i), at: place.get(i), order, marks });
    marks.set(i, mark);
    picture.append(mark);
  }
  marks.get(order[0]).setAttribute("tabindex", "0");
  picture.append(...placeNames([...front, ...order.filter((i) => !onFront.has(i))], place, { front, left, width, height }));
  chart.replaceChildren(picture, byId("tip"));
}

function frame({ across, down, left, width, height }) {
  return [
    ...down.ticks.flatMap((tick) => [
      svg("line", { class: "grid", x1: left, x2: width - 4, y1: down.at(tick), y2: down.at(tick) }),
      svg("text", { class: "tick", x: left - 6, y: down.at(tick) + 4, "text-anchor": "end" }, tickText(tick)),
    ]),
    ...across.ticks.flatMap((tick) => [
      svg("line", { class: "grid", x1: across.at(tick), x2: across.at(tick), y1: 24, y2: height - 38 }),
      svg("text", { class: "tick", x: across.at(tick), y: height - 24, "text-anchor": "middle" }, tickText(tick)),
    ]),
    svg("line", { class: "frame", x1: left, x2: width - 4, y1: height - 38, y2: height - 38 }),
    svg("line", { class: "frame", x1: left, x2: left, y1: 24, y2: height - 38 }),
  ];
}

/** Along the front the next better value in y is reached only at its own x: a stair. */
const stair = (points) => points.map((point, n) => (n === 0 ? `M${point.x},${point.y}` : `H${point.x}V${point.y}`)).join("");

const errorBars = (at, [left, right], [low, high]) => svg("path", { class: "range", d: `M${left},${at.y}H${right}M${at.x},${low}V${high}` });

/** Row -> its mark; the legend is written on the way. */
function colouring(rows) {
  const filter = filters.find((one) => one.key === state.scatter.colour);
  const legend = byId("scatter-legend");
  if (!filter) {
    legend.replaceChildren();
    return () => markOf(0);
  }
  const values = [...new Set(filter.values)].sort((a, b) => collator.compare(say(a), say(b)));
  const numbers = new Map(values.map((value, n) => [value, n]));
  const own = new Map();
  if (filter.key === "axis peft") filter.values.forEach((value, i) => { if (!own.has(value)) own.set(value, styleOf(data.styles[i])); });
  const look = (value) => own.get(value) ?? markOf(numbers.get(value));
  const present = new Set(rows.map((i) => filter.values[i]));
  const told = values.filter((value) => present.has(value)).slice(0, 40);
  legend.replaceChildren(...told.map((value) => {
    const { path, colour } = look(value);
    return el("li", {}, svg("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true" }, svg("path", { d: path, class: colour })), say(value));
  }));
  return (i) => look(filter.values[i]);
}

/** The Pareto set of the report in these two metrics: it counts what other held-out rows and seeds would give. */
function paretoSet(x, y) {
  const cost = y === data.main[0] ? x : x === data.main[0] ? y : null;
  return data.sets[cost] ? new Set(data.sets[cost]) : null;
}

function noteScatter(having, drawn, { front, members, bars, refused }) {
  const told = [];
  if (members) told.push("Thick outline: the Pareto set, the cells that no other beats in both metrics in at least 5 % of resamples of held-out rows and seeds. Dashed line: the front by the values as measured.");
  else if (front.length) told.push("Dashed line and thick outline: the Pareto front, the cells that none of those shown beats in both metrics.");
  else if (having.length > 1) told.push("No Pareto front: one of the metrics is neither better nor worse when it is higher, or these cells may not all be ranked together.");
  if (drawn.length < having.length) told.push(`${drawn.length.toLocaleString("en")} of ${having.length.toLocaleString("en")} cells are drawn; filter the table to see the others.`);
  if (refused.some(Boolean)) told.push("An axis with values that are not above zero stays linear.");
  if (bars.length) told.push("Bars: ± one standard error.");
  byId("scatter-note").textContent = told.join(" ");
}

function scatterPoint(i, { x, y, kinds, best, at, order, marks }) {
  const { path, colour } = kinds(i);
  const mark = svg("path", {
    d: path,
    transform: `translate(${at.x.toFixed(1)},${at.y.toFixed(1)})`,
    class: `point ${colour}${best ? " best" : ""}`,
    tabindex: -1,
    role: "button",
    "data-row": i,
    "aria-label": `${say(data.labels[i])}: ${x.heading} ${numberText(x, i)}, ${y.heading} ${numberText(y, i)}${best ? ", in the Pareto set" : ""}`,
    pointerenter: () => showTip(i, mark),
    pointerleave: () => hideTipSoon(),
    focus: () => showTip(i, mark),
    blur: () => hideTipSoon(),
    // a finger has no hover: its first touch shows what a pointer would have seen
    click: (event) => (event.pointerType === "touch" ? showTip(i, mark) : openDetail(i)),
    keydown: (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (event.key === "Enter" || event.key === " ") openDetail(i);
      else if (step) {
        const next = marks.get(order[(order.indexOf(i) + step + order.length) % order.length]);
        mark.setAttribute("tabindex", "-1");
        next.setAttribute("tabindex", "0");
        next.focus();
      } else return;
      event.preventDefault();
    },
  });
  return mark;
}

/** Names beside the points, as many as find room: over no other name, no point and no line, inside the picture. */
function placeNames(rows, place, { front, left, width, height }) {
  if (rows.length > MAX_LABELLED) return [];
  const taken = [...place.values()].map((at) => ({ x: at.x - RADIUS, y: at.y - RADIUS, w: 2 * RADIUS, h: 2 * RADIUS }));
  for (const [n, i] of front.slice(1).entries()) {
    const [from, to] = [place.get(front[n]), place.get(i)];
    taken.push({ x: Math.min(from.x, to.x), y: from.y - 1, w: Math.abs(to.x - from.x), h: 2 });
    taken.push({ x: to.x - 1, y: Math.min(from.y, to.y), w: 2, h: Math.abs(to.y - from.y) });
  }
  const overlaps = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
  const names = [];
  for (const i of rows) {
    const at = place.get(i);
    const name = say(data.labels[i]);
    if (name.length > 28) continue;
    const w = 6.4 * name.length + 2;
    const spots = [
      { x: at.x + 9, y: at.y - 7 }, { x: at.x - 9 - w, y: at.y - 7 }, { x: at.x + 7, y: at.y - 20 }, { x: at.x + 7, y: at.y + 7 },
      { x: at.x - 7 - w, y: at.y - 20 }, { x: at.x - 7 - w, y: at.y + 7 }, { x: at.x - w / 2, y: at.y - 22 }, { x: at.x - w / 2, y: at.y + 8 },
    ].map((spot) => ({ ...spot, w, h: 14 }));
    const free = spots.find((spot) =>
      spot.x > left && spot.x + w < width && spot.y > 20 && spot.y + 14 < height - 38 && !taken.some((box) => overlaps(spot, box)));
    if (!free) continue;
    taken.push(free);
    names.push(svg("text", { class: "name", x: free.x + 1, y: free.y + 11, "aria-hidden": "true" }, name));
  }
  return names;
}

// ---- what a point tells when it is pointed at or focused

let hiding = null;
function hideTip() {
  clearTimeout(hiding);
  byId("tip").hidden = true;
}

/** Not at once: the pointer, or the focus, may be on its way into the tip. */
function hideTipSoon() {
  clearTimeout(hiding);
  hiding = setTimeout(() => {
    const tip = byId("tip");
    if (!tip.matches(":hover") && !tip.contains(document.activeElement)) tip.hidden = true;
  }, 250);
}

function showTip(i, mark) {
  clearTimeout(hiding);
  const tip = byId("tip");
  const { x, y } = state.scatter;
  const names = [...new Set([y, x, ...data.main])].filter((name) => metricOf(name));
  const command = data.commands[i];
  tip.replaceChildren(
    el("h3", {}, say(data.labels[i])),
    el("p", { class: "id" }, say(data.ids[i])),
    el("dl", { class: "numbers" }, names.map((name) => [el("dt", {}, metricOf(name).heading), el("dd", {}, numberText(metricOf(name), i))])),
    command === null ? el("p", { class: "hint" }, "No command was recorded.") : el("pre", {}, el("code", {}, say(command))),
    el("div", { class: "row" }, command === null ? null : copyButton(say(command)), el("button", { type: "button", click: () => openDetail(i) }, "All of this cell")),
  );
  tip.hidden = false;
  const [chart, point] = [byId("scatter").getBoundingClientRect(), mark.getBoundingClientRect()];
  const { offsetWidth: w, offsetHeight: h } = tip;
  const room = document.documentElement.clientWidth;
  const right = point.right + 10 + w < room;
  const x0 = right ? point.right + 10 : Math.max(8, Math.min(point.left - 10 - w, room - w - 8));
  // beside the point where there is room, else under it or over it
  const beside = right || point.left - 10 - w >= 8;
  const below = point.bottom + 8;
  const y0 = beside ? Math.max(8, Math.min(point.top - 20, window.innerHeight - h - 8)) : below + h < window.innerHeight ? below : point.top - 8 - h;
  tip.style.left = `${x0 - chart.left}px`;
  tip.style.top = `${y0 - chart.top}px`;
}
