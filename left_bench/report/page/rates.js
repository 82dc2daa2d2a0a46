// Validation loss against learning rate: the trials of every tuned method that passes the filters.

function drawRatesSection(section) {
  if (!data.rates.length) return;
  section.append(
    el("h2", {}, "Sensitivity to the learning rate"),
    el("div", { class: "chart", id: "rates" }),
    el("ul", { class: "legend", id: "rates-legend", "aria-label": "Tuned methods; one that is pointed at or focused stands out" }),
    el("p", { class: "hint", id: "rates-note" }),
  );
  plotRedraws.push(drawRates);
  whenResized(byId("rates"), drawRates);
}

function drawRates() {
  const known = new Map(data.rates.map(([i, points, chosen, diverged]) => [i, { i, points, chosen, diverged }]));
  const lines = view.filter((i) => known.has(i)).sort((a, b) => a - b).map((i) => known.get(i));
  const chart = byId("rates");
  byId("rates-note").textContent = lines.length
    ? `Thick outline: the rate chosen.${lines.some(({ diverged }) => diverged.length) ? " Crosses above: training diverged." : ""} Learning rates and losses stand in the table below.`
    : "No cell that passes the filters was tuned.";
  if (!lines.length) {
    chart.replaceChildren();
    byId("rates-legend").replaceChildren();
    return;
  }
  const width = Math.max(280, chart.clientWidth - 14);
  const height = Math.round(Math.min(420, Math.max(280, width * 0.5)));
  const losses = lines.flatMap(({ points }) => points.map(([, loss]) => loss));
  const log = Math.min(...losses) > 0 && Math.max(...losses) > 8 * Math.min(...losses);
  const down = makeScale(losses, { log, from: height - 42, to: 34, steps: 6 });
  const left = 14 + 6.6 * Math.max(...down.ticks.map((tick) => tickText(tick).length));
  const rates = lines.flatMap(({ points, diverged }) => [...points.map(([rate]) => rate), ...diverged]);
  const across = makeScale(rates, { log: true, from: left, to: width - 12, steps: Math.max(2, Math.floor(width / 85)) });
  const at = ([rate, loss]) => `${across.at(rate).toFixed(1)},${down.at(loss).toFixed(1)}`;
  const drawn = lines.map(({ i, points, chosen, diverged }) => {
    const { path, colour } = styleOf(data.styles[i]);
    const name = say(data.labels[i]);
    const mark = (place, size, more, told) => svg("path", { d: path, transform: `translate(${place}) scale(${size})`, class: `point ${colour}${more}` }, svg("title", {}, told));
    return svg("g", { class: "series", "data-row": i },
      svg("polyline", { class: `line ${colour}`, "stroke-dasharray": DASHES[data.styles[i][1] % DASHES.length] || null, points: points.map(at).join(" ") }),
      points.map((point, n) => mark(at(point), n === chosen ? 1 : 0.6, n === chosen ? " best" : "", `${name}: ${tickText(point[0])}, loss ${tickText(point[1])}`)),
      diverged.map((rate) => svg("path", { class: `line ${colour}`, d: "M-4,-4L4,4M-4,4L4,-4", transform: `translate(${across.at(rate).toFixed(1)},24)` }, svg("title", {}, `${name}: ${tickText(rate)}, diverged`))));
  });
  chart.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Validation loss against learning rate of ${lines.length} tuned methods; the table of learning rates has the numbers` },
    ...frame({ across, down, left, width, height }),
    svg("text", { x: 4, y: 14 }, `↑ validation loss (nats)${log ? ", log" : ""}`),
    svg("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, "learning rate, log →"),
    ...drawn));
  const stand = (n) => () => {
    chart.classList.toggle("marked", n !== null);
    drawn.forEach((group, other) => group.classList.toggle("mark", other === n));
  };
  byId("rates-legend").replaceChildren(...lines.map(({ i }, n) => {
    const { path, colour } = styleOf(data.styles[i]);
    return el("li", {}, el("button", { type: "button", pointerenter: stand(n), pointerleave: stand(null), focus: stand(n), blur: stand(null), click: () => openDetail(i) },
      svg("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true" }, svg("path", { d: path, class: colour })),
      say(data.labels[i])));
  }));
}
