"use strict";
// Draws the plots of a report.  All numbers come from the page's own data; nothing is fetched.
const data = JSON.parse(document.getElementById("data").textContent);

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const date = (seconds) => new Date(seconds * 1000);
const width = 1030;
// How an attempt ended, in the order of the legend: what is well, what is expected, what is not.
const KINDS = {
  done: "--good", running: "--accent", "time limit": "#8a7ad6", preempted: "#d69e2e",
  requeued: "#b7791f", stopped: "#4a90a4", "node lost or killed": "#e53e3e", "out of memory": "#97266d", other: "#718096",
};
const kindOf = (ending) => ({
  done: "done", running: "running", "time-limit": "time limit", preempted: "preempted",
  requeued: "requeued", died: "node lost or killed", "driver-died": "node lost or killed",
  "out-of-memory": "out of memory", cancelled: "stopped", terminated: "stopped", stopped: "stopped",
}[ending] ?? "other");
const colour = (kind) => KINDS[kind].startsWith("--") ? css(KINDS[kind]) : KINDS[kind];

function put(id, plot, caption) {
  const figure = document.getElementById(id);
  figure.querySelectorAll(":scope > *:not(figcaption)").forEach((old) => old.remove());
  figure.prepend(plot);
  if (caption) figure.querySelector("figcaption").textContent = caption;
}
// Days only where there are several; hours as a log has them; parts of seconds where ticks need them.
const span = data.attempts.length ? Math.max(...data.attempts.map((one) => one[4])) - Math.min(...data.attempts.map((one) => one[3])) : 0;
const clock = d3.utcFormat(span > 36 * 3600 ? "%d %b %H:%M" : span > 600 ? "%H:%M" : span > 20 ? "%H:%M:%S" : "%H:%M:%S.%L");
const time = { type: "utc", label: null, tickFormat: clock, ticks: 8 };
const style = { background: "transparent", color: "currentColor", fontSize: "12px", overflow: "visible" };

function timeline() {
  const rows = data.attempts.map(([round, task, attempt, start, end, ending, host, completed]) => ({
    label: data.status.rounds.length > 1 ? `${round}.${task}` : `${task}`,
    round, task, attempt, start: date(start), end: date(end), ending, kind: kindOf(ending), host, completed,
  }));
  const used = Object.keys(KINDS).filter((kind) => rows.some((row) => row.kind === kind));
  const labels = [...new Set(rows.map((row) => row.label))];
  const early = rows.filter((row) => !["done", "running"].includes(row.kind));
  const perRow = labels.length > 60 ? Math.max(2, Math.min(5, 1100 / labels.length)) : 14;
  const [height, inset] = [60 + Math.max(4, labels.length) * perRow, perRow > 4 ? 0.5 : 0];
  const title = (row) => `round ${row.round}, task ${row.task}, attempt ${row.attempt} on ${row.host}\n` +
    `${row.ending}; ${row.completed.toLocaleString("en")} sources completed`;
  put("timeline", Plot.plot({
    width, height, style, marginLeft: 64, x: { ...time, grid: true },
    y: { label: data.status.rounds.length > 1 ? "round.task" : "task", domain: labels,
         ticks: labels.length > 40 ? labels.filter((_, n) => n % Math.ceil(labels.length / 20) === 0) : labels,
         tickSize: 0 },
    color: { legend: true, domain: used, range: used.map(colour) },
    marks: [
      Plot.barX(rows, { x1: "start", x2: "end", y: "label", fill: "kind", title, insetTop: inset, insetBottom: inset }),
      Plot.tickX(early, { x: "end", y: "label", stroke: "kind", strokeWidth: 2.5, title }),
    ],
  }));
}

function throughput() {
  const bins = data.throughput.map(([start, end, rate, tasks]) => ({ start: date(start), end: date(end), rate, tasks }));
  put("throughput", Plot.plot({
    width, height: 220, style, marginLeft: 64,
    x: time, y: { label: "sources per second", grid: true, zero: true },
    marks: [
      Plot.rectY(bins, { x1: "start", x2: "end", y1: 0, y2: "rate", fill: css("--accent"), fillOpacity: 0.75,
        title: (bin) => `${bin.rate.toPrecision(3)} sources/s, ${bin.tasks} tasks at work` }),
      Plot.ruleY([0]),
    ],
  }));
  put("at-work", Plot.plot({
    width, height: 130, style, marginLeft: 64,
    x: time, y: { label: "tasks at work", grid: true, zero: true, ticks: 2, tickFormat: "d" },
    marks: [Plot.rectY(bins, { x1: "start", x2: "end", y1: 0, y2: "tasks", fill: css("--good"), fillOpacity: 0.6 }), Plot.ruleY([0])],
  }));
}

function rounds() {
  const bars = data.status.rounds.map((one) => ({ name: `round ${one.round}`, left: one.sources, tasks: one.tasks }));
  bars.push({ name: "now", left: data.status.sources.remaining, tasks: 0 });
  put("rounds", Plot.plot({
    width: 500, height: 50 + 26 * bars.length, style, marginLeft: 72, marginRight: 72, marginBottom: 40,
    x: { label: "sources left", grid: true, ticks: 4, tickFormat: "~s" }, y: { label: null, domain: bars.map((bar) => bar.name) },
    marks: [
      Plot.barX(bars, { x: "left", y: "name", fill: css("--accent"), fillOpacity: 0.75, insetTop: 2, insetBottom: 2 }),
      Plot.text(bars, { x: "left", y: "name", text: (bar) => bar.left.toLocaleString("en"), dx: 6, textAnchor: "start", fill: "currentColor" }),
    ],
  }));
}

function endings() {
  const bars = Object.entries(data.status.endings).map(([ending, count]) => ({ ending, count, kind: kindOf(ending) }));
  if (!bars.length) return;
  put("endings", Plot.plot({
    width: 500, height: 50 + 26 * bars.length, style, marginLeft: 110, marginRight: 60, marginBottom: 40,
    x: { label: "attempts", grid: true, ticks: Math.min(4, Math.max(...bars.map((bar) => bar.count))), tickFormat: "d" }, y: { label: null, domain: bars.map((bar) => bar.ending) },
    marks: [
      Plot.barX(bars, { x: "count", y: "ending", fill: (bar) => colour(bar.kind), insetTop: 2, insetBottom: 2 }),
      Plot.text(bars, { x: "count", y: "ending", text: (bar) => bar.count.toLocaleString("en"), dx: 6, textAnchor: "start", fill: "currentColor" }),
    ],
  }));
}

function stages() {
  const cells = data.status.stages.flatMap((stage) => Object.entries(stage.spread).map(([power, items]) => ({
    stage: stage.name, from: 2 ** +power, to: 2 ** (+power + 1), share: items / Math.max(1, stage.in), items,
  })));
  if (!cells.length) return;
  const names = data.status.stages.map((stage) => stage.name);
  const unit = (s) => s >= 1 ? `${+s.toPrecision(3)} s` : s >= 1e-3 ? `${+(s * 1e3).toPrecision(3)} ms` : `${+(s * 1e6).toPrecision(3)} µs`;
  put("spread", Plot.plot({
    width, height: 50 + 74 * names.length, style, marginLeft: 64, marginRight: 120, marginBottom: 40,
    x: { type: "log", base: 10, label: "seconds per item", tickFormat: unit, ticks: 6 },
    y: { label: "share of items", ticks: 2, tickFormat: "%", zero: true }, fy: { label: null, domain: names },
    marks: [
      Plot.rectY(cells, { fy: "stage", x1: "from", x2: "to", y: "share", fill: css("--accent"), fillOpacity: 0.75, inset: 0.5,
        title: (cell) => `${cell.items.toLocaleString("en")} items of ${cell.stage} took ${unit(cell.from)} to ${unit(cell.to)}` }),
      Plot.ruleY([0]),
    ],
  }));
}

function durations() {
  const hours = data.durations;
  if (hours.length < 8) return document.getElementById("durations").remove();
  put("durations", Plot.plot({
    width, height: 170, style, marginLeft: 64, marginBottom: 40,
    x: { label: "minutes that an attempt ran" }, y: { label: "attempts", grid: true, ticks: 3 },
    marks: [Plot.rectY(hours, Plot.binX({ y: "count" }, { x: (s) => s / 60, thresholds: 40, fill: css("--accent"), fillOpacity: 0.75 })), Plot.ruleY([0])],
  }));
}

function draw() {
  const parts = [rounds, endings, stages];
  if (data.attempts.length) parts.push(timeline, throughput, durations);
  for (const part of parts) part();
  document.body.dataset.drawn = "yes";
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
