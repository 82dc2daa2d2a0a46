// Bars of memory and curves of loss, for the cells that pass the filters, in the order of the table.

const MAX_BARS = 40;
const MAX_CURVES = 28;
const SMOOTHED_FROM = 40; // points from which a curve is drawn as a running mean
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const PART_COLOURS = new Map([["weights", "c0"], ["adapter", "c3"], ["adapter frozen", "c4"], ["gradients", "c2"], ["optimizer", "c1"], ["activations and workspace", "rest"]]);

const partColour = (n) => PART_COLOURS.get(say(data.parts[n])) ?? ["c4", "c5", "c6"][n % 3];

function drawMemorySection(section) {
  if (!data.memory.some(Boolean)) return;
  section.append(
    el("h2", {}, "What the memory peak is made of"),
    el("ul", { class: "legend", "aria-label": "Legend, in the order of the bars" },
      data.parts.map((part, n) => el("li", {}, svg("svg", { viewBox: "0 0 18 18", "aria-hidden": "true" }, svg("path", { d: "M2,2H16V16H2Z", class: partColour(n) })), say(part)))),
    el("div", { class: "chart" }, el("div", { class: "bars", id: "bars", role: "list" })),
    el("p", { class: "hint", id: "bars-note" }),
  );
  plotRedraws.push(drawMemory);
}

function drawMemory() {
  const rows = view.filter((i) => data.memory[i]);
  const drawn = rows.slice(0, MAX_BARS);
  const largest = Math.max(...drawn.map((i) => data.memory[i].at(-1)[0]));
  byId("bars").replaceChildren(...drawn.flatMap((i) => {
    const sizes = data.memory[i];
    const told = data.parts.map((part, n) => [say(part), sizes[n][0], say(sizes[n][1]), partColour(n)]).filter(([, size]) => size > 0);
    return [
      el("span", { class: "name", "aria-hidden": "true" }, say(data.labels[i])),
      el("span", { class: "bar", role: "listitem", "aria-label": `${say(data.labels[i])}: ${say(sizes.at(-1)[1])}, of which ${told.map(([part, , text]) => `${part} ${text}`).join(", ")}` },
        told.map(([part, size, text, colour]) => {
          const piece = el("span", { class: colour, title: `${part}: ${text}` });
          piece.style.width = `calc(${(100 * size) / largest}% - 1px)`;
          return piece;
        })),
      el("span", { "aria-hidden": "true" }, say(sizes.at(-1)[1])),
    ];
  }));
  byId("bars-note").textContent = [
    drawn.length ? "The bars follow the table's order and filters." : "No cell that passes the filters tells its parts.",
    drawn.length < rows.length ? `The first ${drawn.length} of ${rows.length.toLocaleString("en")} are drawn.` : "",
  ].filter(Boolean).join(" ");
}

function drawLossSection(section) {
  if (!data.curves.length) return;
  section.append(
    el("h2", {}, "Training loss"),
    el("div", { class: "chart", id: "loss" }),
    el("p", { class: "count", id: "loss-readout", role: "status" }),
    el("ul", { class: "legend", id: "loss-legend", "aria-label": "Curves; one that is pointed at or focused stands out" }),
    el("p", { class: "hint", id: "loss-note" }),
  );
  plotRedraws.push(drawLoss);
  whenResized(byId("loss"), drawLoss);
}

/** The mean of each value and those before it, `width` in all. */
function runningMean(values, width) {
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i + 1 - width), i + 1);
    return part.reduce((sum, value) => sum + value, 0) / part.length;
  });
}

function drawLoss() {
  const known = new Map(data.curves.map(([i, steps, losses, low, high]) => [i, { steps, losses, low, high }]));
  const rows = view.filter((i) => known.has(i));
  const drawn = rows.slice(0, MAX_CURVES).sort((a, b) => a - b);
  const chart = byId("loss");
  const curves = drawn.map((i, n) => {
    const { steps, losses, low, high } = known.get(i);
    const width = losses.length >= SMOOTHED_FROM ? Math.floor(losses.length / 10) : 1;
    const [colour, shape] = data.styles[i];
    const smooth = (values) => values && runningMean(values, width);
    return { i, steps, losses: smooth(losses), low: smooth(low), high: smooth(high), smooth: width > 1, colour: `c${colour}`, dash: DASHES[shape % DASHES.length] };
  });
  byId("loss-note").textContent = [
    curves.some((curve) => curve.smooth) ? "Running mean over a tenth of the steps." : "",
    curves.some((curve) => curve.low) ? "Band: lowest to highest of the seeds." : "",
    curves.length ? "With the chart focused, up and down choose a curve, left and right a step." : "",
    drawn.length < rows.length ? `The first ${drawn.length} of ${rows.length} curves in the table's order.` : "",
    curves.length ? "" : "No cell that passes the filters has a curve.",
  ].filter(Boolean).join(" ");
  if (!curves.length) {
    chart.replaceChildren();
    byId("loss-legend").replaceChildren();
    return;
  }
  const width = Math.max(280, chart.clientWidth - 14);
  const height = Math.round(Math.min(420, Math.max(280, width * 0.5)));
  const down = makeScale(curves.flatMap((curve) => [...curve.losses, ...(curve.low ?? []), ...(curve.high ?? [])]), { log: false, from: height - 42, to: 30, steps: 6 });
  const left = 14 + 6.6 * Math.max(...down.ticks.map((tick) => tickText(tick).length));
  const across = makeScale(curves.flatMap((curve) => [curve.steps[0], curve.steps.at(-1)]), { log: false, from: left, to: width - 12, steps: Math.max(2, Math.floor(width / 85)) });
  const lines = curves.map((curve) => svg("polyline", {
    class: `line ${curve.colour}`,
    "data-row": curve.i,
    "stroke-dasharray": curve.dash || null,
    points: curve.losses.map((loss, n) => `${across.at(curve.steps[n]).toFixed(1)},${down.at(loss).toFixed(1)}`).join(" "),
  }));
  lines.forEach((line, n) => line.append(svg("title", {}, say(data.labels[curves[n].i]))));
  const along = (curve, values) => values.map((loss, n) => `${across.at(curve.steps[n]).toFixed(1)},${down.at(loss).toFixed(1)}`);
  const bands = curves.filter((curve) => curve.low).map((curve) => svg("polygon", { class: `band ${curve.colour}`, points: [...along(curve, curve.high), ...along(curve, curve.low).reverse()].join(" ") }));
  const cursor = svg("circle", { class: "cursor", r: 5, visibility: "hidden" });
  chart.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "group", "aria-label": `Training loss by optimizer step of ${curves.length} cells; up and down choose a curve, left and right a step`, keydown: (event) => read(event), focus: () => tell(), blur: () => { mark(null)(); cursor.setAttribute("visibility", "hidden"); } },
    ...frame({ across, down, left, width, height }),
    svg("text", { x: 4, y: 14 }, "↑ training loss (nats)"),
    svg("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, "optimizer step →"),
    ...bands,
    ...lines,
    cursor));
  let [chosen, at] = [0, 0];
  const tell = () => {
    const curve = curves[chosen];
    at = Math.max(0, Math.min(at, curve.steps.length - 1));
    mark(chosen)();
    cursor.setAttribute("cx", across.at(curve.steps[at]));
    cursor.setAttribute("cy", down.at(curve.losses[at]));
    cursor.setAttribute("visibility", "visible");
    cursor.parentNode.append(cursor);
    const band = curve.low ? ` (seeds ${tickText(curve.low[at])} to ${tickText(curve.high[at])})` : "";
    byId("loss-readout").textContent = `${say(data.labels[curve.i])}: step ${curve.steps[at]}, loss ${tickText(curve.losses[at])}${band}`;
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
  const mark = (n) => () => {
    chart.classList.toggle("marked", n !== null);
    lines.forEach((line, other) => line.classList.toggle("mark", other === n));
    if (n !== null) lines[n].parentNode.append(lines[n]);
  };
  lines.forEach((line, n) => { line.addEventListener("pointerenter", mark(n)); line.addEventListener("pointerleave", mark(null)); });
  byId("loss-legend").replaceChildren(...curves.map((curve, n) => el("li", {},
    el("button", { type: "button", pointerenter: mark(n), pointerleave: mark(null), focus: mark(n), blur: mark(null), click: () => openDetail(curve.i) },
      svg("svg", { viewBox: "0 0 18 18", "aria-hidden": "true" }, svg("path", { d: "M0,9H18", class: `line ${curve.colour}`, "stroke-dasharray": curve.dash || null })),
      say(data.labels[curve.i])))));
}
