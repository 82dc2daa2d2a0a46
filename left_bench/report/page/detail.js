// One cell in full, in a dialog: its numbers, phases, settings, answers, and the end of its log.

function openDetail(i) {
  const dialog = byId("detail");
  const detail = data.details[i];
  const told = data.metrics.filter((metric) => metric.texts[i] !== null);
  const command = data.commands[i];
  dialog.replaceChildren(
    el("div", { class: "headline" },
      el("h2", { id: "detail-name" }, say(data.labels[i])),
      el("button", { type: "button", click: () => dialog.close() }, "Close")),
    el("p", {}, el("code", {}, say(data.ids[i]))),
    el("p", {}, el("span", { class: statusClass(i) }, say(data.status[i])),
      data.reasons[i] === null ? null : `: ${say(data.reasons[i])}`),
    ...(command === null
      ? [el("p", { class: "hint" }, "No command was recorded.")]
      : [el("pre", {}, el("code", {}, say(command))), copyButton(say(command))]),
    ...(told.length ? [numbersTable(told, i)] : []),
    ...(detail ? parts(detail, i) : []),
  );
  dialog.showModal();
  dialog.scrollTop = 0;
}

function numbersTable(metrics, i) {
  const against = metrics.some((metric) => (metric.against?.[i] ?? null) !== null);
  const lines = metrics.map((metric) =>
    el("tr", {},
      el("th", { scope: "row", title: metric.meaning }, metric.heading),
      el("td", { class: "number" }, numberText(metric, i)),
      against ? el("td", { class: "number" }, metric.against?.[i] == null ? "" : say(metric.against[i])) : null));
  return fold("Numbers", plainTable(["metric", "measured", ...(against ? ["against the baseline"] : [])], lines), true);
}

function parts(detail, i) {
  const memory = data.memory[i];
  const rowsOf = (pairs) => pairs.map(([key, value]) => el("tr", {}, el("th", { scope: "row" }, say(key)), el("td", {}, say(value))));
  const phases = detail.phases.map(([name, seconds, peak]) =>
    el("tr", {}, el("th", { scope: "row" }, say(name)), el("td", { class: "number" }, say(seconds)), el("td", { class: "number" }, say(peak))));
  const sizes = memory && [...data.parts, null].map((part, place) =>
    memory[place][0] ? el("tr", {}, el("th", { scope: "row" }, part === null ? "together" : say(part)), el("td", { class: "number" }, say(memory[place][1]))) : null);
  return [
    detail.runs ? fold("Every seed", seedsTable(detail.runs), true) : null,
    detail.runs ? el("p", { class: "hint" }, `Everything below is from seed ${say(detail.seed)}.`) : null,
    detail.samples?.length ? fold(`Answers (${detail.samples.length})`, detail.samples.map(sample), true) : null,
    detail.log === undefined ? null : fold("End of the log", el("pre", {}, say(detail.log)), true),
    phases.length ? fold("Phases", plainTable(["phase", "time", "peak memory"], phases)) : null,
    sizes ? fold("What the memory peak is made of", plainTable(["part", "size"], sizes)) : null,
    detail.settings.length ? fold("Settings that not all cells share", plainTable(["setting", "value"], rowsOf(detail.settings))) : null,
    data.constants.length ? fold("Settings that all cells share", plainTable(["setting", "value"], rowsOf(data.constants))) : null,
    detail.effective.length ? fold("In force", plainTable(["what", "value"], rowsOf(detail.effective))) : null,
    el("p", { class: "hint" }, `${say(detail.when)}${detail.machine === undefined ? "" : `, on ${say(detail.machine)}`}`),
  ].filter(Boolean);
}

function seedsTable(runs) {
  const lines = runs.map(([seed, status, ...values]) =>
    el("tr", {},
      el("th", { scope: "row" }, say(seed)),
      el("td", {}, say(status)),
      values.slice(0, -1).map((value) => el("td", { class: "number" }, say(value))),
      el("td", {}, el("code", {}, say(values.at(-1))))));
  return plainTable(["seed", "status", ...data.main.map((name) => metricOf(name)?.heading ?? name), "command"], lines);
}

function sample([prompt, reference, before, after]) {
  const answer = (name, text) => (text === null ? [] : [el("dt", {}, name), el("dd", {}, say(text) || el("i", {}, "nothing"))]);
  return el("div", { class: "sample" }, el("pre", {}, say(prompt)),
    el("dl", { class: "answers" }, answer("reference", reference), answer("before training", before), answer("after training", after)));
}

function plainTable(head, lines) {
  return el("div", { class: "scroll", tabindex: 0 },
    el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, lines)));
}

function fold(name, inside, open = false) {
  return el("details", { open }, el("summary", {}, name), inside);
}
