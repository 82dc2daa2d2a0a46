// Lines over training with a band over the seeds: training loss by step, quality by what was spent.

const MAX_LINES = 60;
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "12 3", "1 4"]; // in the order of report/styles.py
const MARKS = 5; // markers along a line of many points; of few, every point has one
const SMOOTHED_FROM = 20; // steps from which report/bands.py smooths
const LOSS_LOG_FROM = 8; // the ratio of highest to lowest from which a loss is drawn on a logarithmic axis

function lineSection(section, id, heading, ...controls) {
  section.append(
    el("h2", {}, heading),
    ...controls,
    el("div", { class: "chart", id }),
    el("p", { class: "count", id: `${id}-readout`, role: "status" }),
    el("ul", { class: "legend", id: `${id}-legend`, "aria-label": "Lines; one that is pointed at or focused stands out" }),
    el("p", { class: "hint", id: `${id}-note` }),
  );
}

function drawLossSection(section) {
  if (!data.curves.length) return;
  lineSection(section, "loss", "Training loss");
  const draw = () => drawLines("loss", data.curves, {
    up: "training loss (nats)",
    across: "optimizer step",
    at: (step, loss) => `step ${step}, loss ${loss}`,
    notes: data.curves.some(([, steps]) => steps.at(-1) >= SMOOTHED_FROM) ? ["Running mean over a tenth of the steps."] : [],
  });
  plotRedraws.push(draw);
  whenResized(byId("loss"), draw);
}

function drawAlongSection(section) {
  if (!data.along) return;
  const { metrics, axes, lines } = data.along;
  const { along } = state;
  const known = (options, name) => (options.some(([key]) => key === name) ? name : options[0][0]);
  along.metric = known(metrics, along.metric);
  along.over = known(axes, along.over);
  Object.assign(firstView.along, { metric: metrics[0][0], over: axes[0][0] });
  const choice = (key, name, options) => {
    if (options.length < 2) return null;
    const select = el("select", { id: `along-${key}`, change: () => { along[key] = select.value; draw(); keepAddress(); } },
      options.map(([value, text]) => el("option", { value }, say(text))));
    select.value = along[key];
    return el("label", {}, name, select);
  };
  const draw = () => {
    const [metric, axis] = [metrics.findIndex(([key]) => key === along.metric), axes.findIndex(([key]) => key === along.over)];
    const [, heading, better] = metrics[metric];
    const over = say(axes[axis][1]);
    drawLines("along", lines[metric * axes.length + axis], {
      up: `${say(heading)}${along.metric === "validation_loss" ? " (nats per answer token)" : ""}, ${better === "lower" ? "down" : "up"} is better`,
      across: over,
      at: (place, value) => `${place} ${over}, ${say(heading)} ${value}`,
      log: better === "lower",
      notes: ["Of the validation rows, while training. Seconds, tokens and joules are those of the optimizer steps alone."],
    });
  };
  lineSection(section, "along", "Quality along training", el("div", { class: "axes" }, choice("metric", "up", metrics), choice("over", "across", axes)));
  plotRedraws.push(draw);
  whenResized(byId("along"), draw);
}

/**
 * Lines of the cells that pass the filters: [cell, places, values, lowest and highest of the seeds where they differ].
 * `at` tells a point in words.
 */
function drawLines(id, lines, { up, across: acrossName, at: tellPoint, log = false, notes }) {
  const known = new Map(lines.map((line) => [line[0], line]));
  const rows = view.filter((i) => known.has(i));
  const curves = rows.slice(0, MAX_LINES).sort((a, b) => a - b).map((i) => {
    const [, places, values, low, high] = known.get(i);
    const [colour, shape, dash] = data.styles[i];
    return { i, places, values, low, high, colour: `c${colour}`, shape: SHAPES[shape], dash: DASHES[dash] };
  });
  const chart = byId(id);
  byId(`${id}-readout`).textContent = "";
  byId(`${id}-note`).textContent = [
    ...(curves.length ? notes : ["No cell that passes the filters has a line here."]),
    curves.some((curve) => curve.low) ? "Band: lowest to highest of the seeds." : "",
    curves.length ? "With the chart focused, up and down choose a line, left and right a point." : "",
    curves.length < rows.length ? `The first ${curves.length} of ${rows.length} lines in the table's order.` : "",
  ].filter(Boolean).join(" ");
  if (!curves.length) {
    chart.replaceChildren();
    byId(`${id}-legend`).replaceChildren();
    return;
  }
  const width = Math.max(280, chart.clientWidth - 14);
  const height = Math.round(Math.min(420, Math.max(280, width * 0.5)));
  const all = curves.flatMap((curve) => [...curve.values, ...(curve.low ?? []), ...(curve.high ?? [])]);
  const asLog = log && Math.min(...all) > 0 && Math.max(...all) >= LOSS_LOG_FROM * Math.min(...all);
  const down = makeScale(all, { log: asLog, from: height - 42, to: 30, steps: 6 });
  const left = 14 + 6.6 * Math.max(...down.ticks.map((tick) => tickText(tick).length));
  const across = makeScale(curves.flatMap((curve) => [curve.places[0], curve.places.at(-1)]), { log: false, from: left, to: width - 12, steps: Math.max(2, Math.floor(width / 85)) });
  const along = (curve, values) => values.map((value, n) => `${across.at(curve.places[n]).toFixed(1)},${down.at(value).toFixed(1)}`);
  const bands = curves.filter((curve) => curve.low).map((curve) => svg("polygon", { class: `band ${curve.colour}`, points: [...along(curve, curve.high), ...along(curve, curve.low).reverse()].join(" ") }));
  const drawn = curves.map((curve) => svg("g", { class: "series", "data-row": curve.i },
    svg("title", {}, say(data.labels[curve.i])),
    svg("polyline", { class: `line ${curve.colour}`, "stroke-dasharray": curve.dash || null, points: along(curve, curve.values).join(" ") }),
    marksAlong(curve).map((n) => svg("path", { class: curve.colour, d: curve.shape, transform: `translate(${across.at(curve.places[n]).toFixed(1)},${down.at(curve.values[n]).toFixed(1)}) scale(0.6)` }))));
  const cursor = svg("circle", { class: "cursor", r: 5, visibility: "hidden" });
  const mark = (n) => {
    chart.classList.toggle("marked", n !== null);
    drawn.forEach((line, other) => line.classList.toggle("mark", other === n));
    if (n !== null) drawn[n].parentNode.append(drawn[n]);
  };
  let [chosen, at] = [0, 0];
  const tell = () => {
    const curve = curves[chosen];
    at = Math.max(0, Math.min(at, curve.places.length - 1));
    mark(chosen);
    cursor.setAttribute("cx", across.at(curve.places[at]));
    cursor.setAttribute("cy", down.at(curve.values[at]));
    cursor.setAttribute("visibility", "visible");
    cursor.parentNode.append(cursor);
    const band = curve.low ? ` (seeds ${tickText(curve.low[at])} to ${tickText(curve.high[at])})` : "";
    byId(`${id}-readout`).textContent = `${say(data.labels[curve.i])}: ${tellPoint(tickText(curve.places[at]), tickText(curve.values[at]))}${band}`;
  };
  const read = (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    if (event.key === "Enter") openDetail(curves[chosen].i);
    else if (move) {
      chosen = (chosen + move[0] + curves.length) % curves.length;
      at += move[1];
      tell();
    } else return;
    event.preventDefault();
  };
  chart.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "group", "aria-label": `${up} by ${acrossName}, ${curves.length} lines; up and down choose a line, left and right a point`, keydown: read, focus: tell, blur: () => { mark(null); cursor.setAttribute("visibility", "hidden"); } },
    ...frame({ across, down, left, width, height }),
    svg("text", { x: 4, y: 14 }, `↑ ${up}${asLog ? ", log" : ""}`),
    svg("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, `${acrossName} →`),
    ...bands,
    ...drawn,
    cursor));
  const stand = (n) => ({ pointerenter: () => mark(n), pointerleave: () => mark(null) });
  drawn.forEach((line, n) => dress(line, stand(n), []));
  // reached by tabbing: the chart itself, whose arrow keys do what these buttons do
  byId(`${id}-legend`).replaceChildren(...curves.map((curve, n) => el("li", {},
    el("button", { type: "button", tabindex: -1, ...stand(n), focus: () => mark(n), blur: () => mark(null), click: () => openDetail(curve.i) },
      svg("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true" },
        svg("path", { d: "M-9,0H9", class: `line ${curve.colour}`, "stroke-dasharray": curve.dash || null }),
        svg("path", { class: curve.colour, d: curve.shape, transform: "scale(0.8)" })),
      say(data.labels[curve.i])))));
}

/** Which points of a line have a marker: at other places for each shape, so that lines that lie together show both. */
function marksAlong({ i, places }) {
  const every = places.length > 2 * MARKS ? Math.floor(places.length / MARKS) : 1;
  return places.map((_, n) => n).filter((n) => n % every === data.styles[i][1] % every);
}
