// The leaderboard: which columns, which rows, in which order, a page at a time.

const PAGE_ROWS = 200;
const KINDS = { quality: "Quality", memory: "Memory", size: "Size", speed: "Speed", energy: "Energy", cost: "Cost", fact: "Facts" };
const someFailed = rowNumbers.some((i) => say(data.status[i]) !== "ok");

/** The table's columns as they are chosen: a key, a heading, and a text or a metric. */
function columns() {
  const axes = state.axes ? data.axes : [];
  return [
    { key: "cell", heading: "cell", text: (i) => say(data.labels[i]) },
    ...(data.places.some((place) => place !== null) ? [{ key: "place", heading: "#", numbers: data.places, text: (i) => String(data.places[i] ?? ABSENT) }] : []),
    ...(data.pareto && window.innerWidth > 640 ? [{ key: "pareto", heading: "Pareto set", text: (i) => (data.pareto_texts[i] === null ? "" : say(data.pareto_texts[i])) }] : []),
    ...axes.map((axis) => ({ key: `axis ${say(axis.key)}`, heading: say(axis.heading), text: (i) => say(axis.values[i]) })),
    ...(someFailed ? [{ key: "status", heading: "status", text: (i) => say(data.status[i]) }] : []),
    ...data.metrics
      .filter((metric) => state.shown.has(metric.name))
      .map((metric) => ({ key: `metric ${metric.name}`, heading: metric.heading, metric })),
  ];
}

/** Best first, then the other way round, then the sweep's own order. */
function nextSort(column) {
  const first = column.metric?.better === "higher";
  if (state.sort?.key !== column.key) return { key: column.key, descending: first };
  return state.sort.descending === first ? { key: column.key, descending: !first } : null;
}

function drawHead() {
  const cells = columns().map((column) =>
    el(
      "th",
      { scope: "col", class: column.metric || column.numbers ? "number" : null, "data-key": column.key },
      el(
        "button",
        {
          type: "button",
          title: column.metric ? `${column.metric.meaning} (${column.metric.better === "none" ? "no better or worse" : `${column.metric.better} is better`})` : null,
          click: () => {
            state.sort = nextSort(column);
            state.page = 0;
            changed();
          },
        },
        column.heading,
        el("span", { class: "arrow", "aria-hidden": "true" }),
      ),
    ),
  );
  byId("leaderboard").tHead.replaceChildren(el("tr", {}, cells));
}

function drawBody() {
  const shown = columns();
  for (const th of byId("leaderboard").tHead.rows[0].cells) {
    const sort = state.sort?.key === th.dataset.key ? state.sort : null;
    if (sort) th.setAttribute("aria-sort", sort.descending ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
    th.querySelector(".arrow").textContent = sort ? (sort.descending ? "▼" : "▲") : "↕";
  }
  const last = Math.max(0, Math.ceil(view.length / PAGE_ROWS) - 1);
  state.page = Math.min(state.page, last);
  const start = state.page * PAGE_ROWS;
  const rows = view.slice(start, start + PAGE_ROWS);
  byId("leaderboard").tBodies[0].replaceChildren(
    ...rows.map((i) => el("tr", { "data-row": i }, shown.map((column) => tableCell(column, i)))),
    ...(rows.length ? [] : [el("tr", {}, el("td", { colspan: shown.length }, "No cell passes these filters."))]),
  );
  drawCount(start, rows.length, shown);
  byId("leaderboard-box").classList.toggle("tall", rows.length > 30);
  byId("pages").hidden = last === 0;
  byId("pages").replaceChildren(
    pageButton("First", 0, state.page === 0),
    pageButton("Previous", state.page - 1, state.page === 0),
    el("span", {}, `page ${state.page + 1} of ${last + 1}`),
    pageButton("Next", state.page + 1, state.page === last),
    pageButton("Last", last, state.page === last),
  );
}

function pageButton(name, page, disabled) {
  return el("button", {
    type: "button",
    disabled,
    click: () => {
      state.page = page;
      drawBody();
      const again = [...byId("pages").querySelectorAll("button")];
      (again.find((button) => button.textContent === name && !button.disabled) ?? again.find((button) => !button.disabled)).focus();
      byId("leaderboard-box").scrollTop = 0;
    },
  }, name);
}

function drawCount(start, number, shown) {
  const many = (n) => n.toLocaleString("en");
  const parts = [`${many(view.length)} of ${many(data.cells)} cells`];
  if (number < view.length) parts.push(`rows ${many(start + 1)} to ${many(start + number)}`);
  const column = state.sort && shown.find((one) => one.key === state.sort.key);
  if (column) {
    parts.push(`sorted by ${column.heading}, ${state.sort.descending ? "highest" : "lowest"} first`);
    if (column.metric?.groups) parts.push("cells that were measured differently are sorted separately");
  }
  byId("count").textContent = `${parts.join(", ")}.`;
}

function tableCell(column, i) {
  if (column.key === "cell") {
    return el(
      "th",
      { scope: "row" },
      el("button", { type: "button", title: "show all of this cell", click: () => openDetail(i) }, say(data.labels[i])),
      i === data.baseline ? el("small", {}, " baseline") : null,
    );
  }
  if (column.key === "status") return el("td", {}, statusOf(i));
  const { metric } = column;
  if (!metric) return el("td", { class: column.numbers ? "number" : null }, column.text(i));
  if (metric.texts[i] === null) return el("td", { class: "number" }, ABSENT);
  const error = metric.error_texts?.[i] ?? null;
  const against = metric.against?.[i] ?? null;
  const best = metric.bestRows.has(i);
  return el(
    "td",
    { class: "number", "data-metric": metric.name },
    el(best ? "strong" : "span", best ? { title: "best of the column" } : {}, say(metric.texts[i])),
    error === null ? null : el("span", { class: "error" }, ` ± ${say(error)}`),
    metric.unresolvedRows.has(i) ? el("span", { class: "tie", title: "not resolved from the best" }, " ≈") : null,
    against === null ? null : el("span", { class: "against", title: "against the baseline" }, say(against)),
  );
}

function statusOf(i) {
  return [
    el("span", { class: statusClass(i) }, say(data.status[i])),
    data.reasons[i] === null ? null : el("span", { class: "reason", title: say(data.reasons[i]) }, say(data.reasons[i])),
  ];
}

// ---- the controls above the table

function drawControls() {
  const search = el("input", {
    type: "search",
    id: "query",
    placeholder: "Filter by any word",
    "aria-label": "Filter the cells by words in their name, id, settings, status or reason",
    input: () => {
      state.query = search.value;
      state.page = 0;
      changed();
    },
  });
  search.value = state.query;
  const clear = el("button", { type: "button", id: "clear", click: () => {
    state.query = search.value = "";
    state.chosen.clear();
    byId("controls").querySelectorAll(".filter input").forEach((box) => { box.checked = true; });
    state.page = 0;
    changed();
  } }, "Clear filters");
  byId("controls").append(search, ...filters.map(filterMenu), columnMenu(), clear);
  byId("controls").hidden = false;
  document.addEventListener("click", (event) => closeMenus(event.target));
  document.addEventListener("keydown", (event) => {
    const open = event.key === "Escape" && document.querySelector(".menu[open]");
    if (!open) return;
    closeMenus(null);
    open.querySelector("summary").focus();
  });
  redraws.push(() => {
    clear.disabled = !state.query && state.chosen.size === 0;
  });
}

function closeMenus(within) {
  for (const menu of document.querySelectorAll(".menu[open]")) if (!menu.contains(within)) menu.open = false;
}

function menu(attributes, summary, ...inside) {
  const box = el("details", attributes, summary, el("div", {}, inside));
  box.addEventListener("toggle", () => {
    if (!box.open) return;
    const panel = box.querySelector("div"); // a menu near the right edge opens to the left
    panel.style.left = "0";
    const over = panel.getBoundingClientRect().right - document.documentElement.clientWidth + 8;
    if (over > 0) panel.style.left = `${-over}px`;
  });
  return box;
}

/** A menu with a box for every value of an axis; none unchecked means that the axis is not filtered. */
function filterMenu(filter) {
  const counts = new Map();
  for (const value of filter.values) counts.set(value, (counts.get(value) ?? 0) + 1);
  const values = [...counts.keys()].sort((a, b) => collator.compare(say(a), say(b)));
  const summary = el("summary", {});
  const boxes = values.map((value) => {
    const box = el("input", { type: "checkbox", change: () => choose() });
    box.checked = !state.chosen.has(filter.key) || state.chosen.get(filter.key).has(value);
    return { value, box };
  });
  const choose = () => {
    const wanted = new Set(boxes.filter(({ box }) => box.checked).map(({ value }) => value));
    if (wanted.size === values.length) state.chosen.delete(filter.key);
    else state.chosen.set(filter.key, wanted);
    state.page = 0;
    changed();
  };
  const setAll = (checked) => () => {
    for (const { box } of boxes) box.checked = checked;
    choose();
  };
  const box = menu(
    { class: "menu filter", "data-filter": filter.key },
    summary,
    el("div", { class: "row" }, el("button", { type: "button", click: setAll(true) }, "All"), el("button", { type: "button", click: setAll(false) }, "None")),
    el("fieldset", {}, el("legend", {}, filter.heading), boxes.map(({ value, box }) => el("label", {}, box, `${say(value)} (${counts.get(value)})`))),
  );
  redraws.push(() => {
    const wanted = state.chosen.get(filter.key);
    box.classList.toggle("active", Boolean(wanted));
    const told = !wanted ? "all" : wanted.size === 0 ? "none" : wanted.size <= 2 ? [...wanted].map(say).join(", ") : `${wanted.size} of ${values.length}`;
    summary.textContent = `${filter.heading}: ${told}`;
  });
  return box;
}

function columnMenu() {
  const summary = el("summary", {});
  const tell = () => { summary.textContent = `Columns: ${state.shown.size} of ${data.metrics.length}`; };
  tell();
  const groups = Object.entries(KINDS).map(([kind, name]) => {
    const inside = data.metrics.filter((metric) => metric.kind === kind);
    if (!inside.length) return null;
    return el("fieldset", {}, el("legend", {}, name), inside.map((metric) => {
      const box = el("input", { type: "checkbox", "data-column": metric.name, change: () => {
        if (box.checked) state.shown.add(metric.name);
        else state.shown.delete(metric.name);
        if (state.sort && !columns().some((column) => column.key === state.sort.key)) state.sort = null;
        tell();
        drawHead();
        changed();
      } });
      box.checked = state.shown.has(metric.name);
      return el("label", {}, box, metric.heading);
    }));
  });
  return menu({ class: "menu columns" }, summary, data.axes.length > 1 ? axesBox() : null, groups);
}

function axesBox() {
  const box = el("input", { type: "checkbox", "data-column": "axes", change: () => {
    state.axes = box.checked;
    if (state.sort && !columns().some((column) => column.key === state.sort.key)) state.sort = null;
    drawHead();
    changed();
  } });
  box.checked = state.axes;
  return el("fieldset", {}, el("legend", {}, "Settings"), el("label", {}, box, data.axes.map((axis) => say(axis.heading)).join(", ")));
}
