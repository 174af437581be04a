"use strict";
// The form is made from what /form says; nothing here knows a task. All text is shown with textContent.

const FIRST = ["size", "frames", "steps", "guidance", "seed", "fps"]; // shown at once; other fields are under "More settings"
const $ = (id) => document.getElementById(id);
const inputs = {}; // field -> {box, read(): value or undefined, write(value)}
const cards = {}; // job -> {job, card}
let about, queue = "", version = 0;

function make(tag, values = {}, ...children) {
  const node = Object.assign(document.createElement(tag), values);
  node.append(...children);
  return node;
}

const words = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ").replace(/ b$/, " B");

async function ask(path, options = {}) {
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// --- the form

function field(name) {
  const known = about.fields[name];
  const box = make("div", { className: "field" });
  const label = make("label", { htmlFor: name, textContent: words(name), title: known.help });
  box.append(label);
  box.append(...(KINDS[kind(name)] || text)(name, known, box));
  label.append(make("small", { className: "need", textContent: name === "size" ? "height, width" : "" }));
  inputs[name].box = box;
  return box;
}

function kind(name) {
  const known = about.fields[name];
  if (known.file) return "file";
  if (known.choices) return "choice";
  return name in KINDS ? name : known.type;
}

function text(name, known, box) {
  const long = name.endsWith("prompt");
  const input = make(long ? "textarea" : "input", { id: name, name, rows: 2, title: limits(known) });
  if (known.type === "int" || known.type === "float") input.inputMode = "decimal";
  input.placeholder = known.default === null || known.default === "" ? "" : shown(known.default);
  if (name === "prompt") input.placeholder = known.help.split(";")[0];
  inputs[name] = {
    read: () => input.value.trim() === "" ? undefined : parse(input.value.trim(), known.type),
    write: (value) => { input.value = value === undefined ? "" : shown(value); },
  };
  const explained = known.type === "list" && !FIRST.includes(name) || (long && name !== "prompt");
  box.classList.toggle("wide", long || explained);
  return explained ? [input, hint(known.help)] : [input];
}

const hint = (text) => make("p", { className: "hint", textContent: text });
const limits = (known) => known.help + (known.limits ? `; from ${known.limits[0]} to ${known.limits[1]}` : "");

function shown(value) {
  if (!Array.isArray(value)) return String(value);
  return value.some((item) => typeof item === "object") ? JSON.stringify(value) : value.join(", ");
}

// What was typed as the type of the field, or as it is: the server says what is wrong with it.
function parse(typed, type) {
  if (type === "str") return typed;
  try {
    if (type === "list") return JSON.parse(typed.startsWith("[") ? typed : `[${typed.replace(/[x×]/g, ",")}]`);
    return JSON.parse(typed);
  } catch { return typed; }
}

function choice(name, known) {
  const input = make("select", { id: name, name, title: known.help });
  for (const item of known.choices) input.append(make("option", { value: item, textContent: name === "task" ? words(item) : item }));
  input.value = known.default;
  inputs[name] = { read: () => input.value, write: (value) => { input.value = value ?? known.default; } };
  return [input];
}

function file(name, known, box) {
  let chosen;
  const input = make("input", { type: "file", id: name, accept: "image/*,video/*" });
  const thumb = make("div", { className: "thumb" });
  const said = make("div", { className: "said" });
  const pick = make("label", { className: "pick", htmlFor: name, textContent: "Choose a file" });
  const clear = make("button", { type: "button", textContent: "Remove" });
  const drop = make("div", { className: "drop" }, input, thumb, said, clear);
  const none = () => { chosen = undefined; input.value = ""; clear.hidden = true; thumb.replaceChildren(); said.replaceChildren(pick, make("small", { textContent: known.help })); };
  const show = (upload) => {
    chosen = upload.id;
    clear.hidden = false;
    thumb.replaceChildren(player(`/uploads/${upload.id}`, upload.type || "", false));
    const size = upload.size ? `${upload.size[1]} × ${upload.size[0]}` : "";
    const frames = upload.frames > 1 ? `, ${upload.frames} frames` : "";
    said.replaceChildren(upload.name, make("small", { textContent: size + frames }));
  };
  const send = async (sent) => {
    if (!sent) return;
    problem("");
    none();
    said.textContent = `Sending ${sent.name} …`;
    try {
      if (sent.size > about.max_upload) throw new Error(`${sent.name} has ${(sent.size / 2 ** 20).toFixed(1)} MB; at most ${about.max_upload / 2 ** 20} are taken`);
      show(await ask(`/uploads?name=${encodeURIComponent(sent.name)}`, { method: "POST", body: sent }));
    } catch (error) { none(); problem(error.message); }
  };
  input.addEventListener("change", () => send(input.files[0]));
  clear.addEventListener("click", none);
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); send(event.dataTransfer.files[0]); });
  box.classList.add("wide");
  inputs[name] = { read: () => chosen, write: (value) => value?.id ? show(value) : none(), send };
  none();
  return [drop];
}

function shots(name, known, box) {
  const rows = make("div");
  const add = (shot = {}) => {
    const row = make("div", { className: "shot" },
      make("input", { value: shot.seconds ?? "", placeholder: "seconds", inputMode: "decimal", ariaLabel: "seconds" }),
      make("input", { value: shot.prompt ?? "", placeholder: "what to show", ariaLabel: "prompt of the shot" }),
      make("button", { type: "button", textContent: "×", title: "Remove", onclick: () => row.remove() }));
    rows.append(row);
  };
  inputs[name] = {
    read: () => rows.children.length ? [...rows.children].map((row) => {
      const [seconds, prompt] = row.querySelectorAll("input");
      return { seconds: parse(seconds.value.trim(), "float"), prompt: prompt.value };
    }) : undefined,
    write: (value) => { rows.replaceChildren(); for (const [seconds, prompt] of value ?? []) add({ seconds, prompt }); },
  };
  box.classList.add("wide");
  return [rows, make("div", {}, make("button", { type: "button", textContent: "Add a shot", title: known.help, onclick: () => add() }))];
}

const KINDS = { file, choice, shots };

function build() {
  const names = Object.keys(about.fields);
  const withTask = (name) => about.only_with.includes(name);
  const isFirst = (name) => FIRST.includes(name) || withTask(name);
  $("fields").append(field("task"), field("prompt"));
  inputs.task.box.classList.add("wide");
  inputs.task.box.append(make("p", { className: "hint", id: "task-help" }));
  for (const name of names.filter(withTask)) $("fields").append(field(name));
  for (const name of FIRST) $("fields").append(field(name));
  for (const name of names.filter((name) => !isFirst(name) && !inputs[name])) $("more-fields").append(field(name));
  $("task").addEventListener("change", choose);
  choose();
}

// Shows the fields that the chosen task needs or takes.
function choose() {
  const task = about.tasks[inputs.task.read()];
  const files = [...task.needs, ...task.one_of, ...task.takes].filter((name) => about.fields[name].file);
  $("task-help").textContent = files.length ? task.help : "";
  for (const name of about.only_with) {
    const { box } = inputs[name];
    box.hidden = ![...task.needs, ...task.one_of, ...task.takes].includes(name);
    box.querySelector(".need").textContent = task.needs.includes(name) ? "needed"
      : task.one_of.includes(name) ? `${task.one_of.join(" or ").replaceAll("_", " ")} needed` : "";
  }
  problem("");
}

async function submit(event) {
  event.preventDefault();
  problem("");
  const fields = {};
  for (const [name, input] of Object.entries(inputs)) {
    const value = input.box.hidden ? undefined : input.read();
    if (value !== undefined) fields[name] = value;
  }
  $("make").disabled = true;
  try {
    await ask("/requests", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields) });
    await refresh();
    const results = $("jobs").getBoundingClientRect();
    if (results.top > innerHeight) $("jobs").scrollIntoView({ behavior: "smooth" }); // on a phone they are below
  } catch (error) { problem(error.message); }
  $("make").disabled = false;
}

// --- the results

function player(path, type, controls = true) {
  if (type.startsWith("image/")) return make("img", { src: path, alt: "" });
  return make("video", { src: path, loop: true, muted: true, autoplay: true, playsInline: true, controls });
}

// Videos are loaded when they are first seen, and play while they are.
const onScreen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !target.firstChild) target.append(player(target.dataset.path, target.dataset.type));
    const video = target.querySelector("video");
    if (video && !isIntersecting) video.pause();
    else video?.play().catch(() => {});
  }
});

const resultOf = (job) => `/results/${encodeURIComponent(job.id)}`;
const typeOf = (path) => path.endsWith(".png") ? "image/png" : "video/mp4";

function settings(job) {
  const list = make("dl", { className: "settings" });
  const add = (name, value) => list.append(make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
  for (const [name, value] of Object.entries(job.settings)) {
    if (name === "prompt" || (name === "task" && value === about.fields.task.default)) continue;
    if (JSON.stringify(value) === JSON.stringify(about.fields[name]?.default) && !FIRST.includes(name)) continue;
    if (name === "size" && Array.isArray(value)) add(name, value.join(" × "));
    else if (name === "shots") add(name, value.map(([seconds, prompt]) => `${seconds} s: ${prompt}`).join("; "));
    else add(words(name).toLowerCase(), name === "task" ? words(value).toLowerCase() : value.name ?? shown(value));
  }
  if (job.seconds !== null) add("took", `${job.seconds.toFixed(1)} s`);
  return list;
}

function status(job) {
  if (job.status === "failed") return [make("p", { textContent: job.error || "It failed." })];
  if (job.status === "cancelled") return [make("p", { textContent: "Cancelled" })];
  if (job.status === "waiting") {
    const before = Object.values(cards).filter(({ job: other }) => ["waiting", "running"].includes(other.status) && other.order < job.order).length;
    return [make("p", { textContent: before > 1 ? `Waiting, ${before} before it` : "Waiting" })];
  }
  const unit = job.stage === "decoding" ? "frame" : "step";
  const line = job.cancelled ? "Ending after this step …" : job.done ? `${words(unit)} ${job.done} of ${job.total}` : job.stage === "decoding" ? "Decoding …" : "Starting …";
  return [make("p", {}, line, make("progress", job.total ? { max: job.total, value: job.done } : {}))];
}

function act(job) {
  const row = make("div", { className: "actions" });
  if (["waiting", "running"].includes(job.status)) {
    row.append(make("button", { textContent: "Cancel", onclick: () => ask(`/requests/${encodeURIComponent(job.id)}`, { method: "DELETE" }).then(refresh, () => {}) }));
    return row;
  }
  if (job.status === "done") row.append(make("a", { href: resultOf(job), download: job.path, textContent: "Download" }));
  row.append(make("button", { textContent: "Reuse settings", onclick: () => reuse(job) }));
  if (job.status === "done") row.append(make("button", { textContent: "Continue", title: "as the file of a task that takes one", onclick: () => continueFrom(job) }));
  return row;
}

function reuse(job) {
  for (const [name, input] of Object.entries(inputs)) {
    const value = job.settings[name];
    const isDefault = JSON.stringify(value) === JSON.stringify(about.fields[name].default);
    input.write(isDefault && name !== "task" ? undefined : value);
  }
  choose();
  scrollTo({ top: 0, behavior: "smooth" });
}

// Sends a result back as a file: to the first file field of the chosen task, or of the first task that needs one.
async function continueFrom(job) {
  const wanted = (task) => [...task.needs, ...task.one_of, ...task.takes].find((name) => about.fields[name].file);
  const isVideo = typeOf(job.path) === "video/mp4";
  if (!wanted(about.tasks[inputs.task.read()])) {
    const fits = Object.entries(about.tasks).filter(([, task]) => task.needs.some((name) => about.fields[name].file));
    const [name] = fits.find(([, task]) => wanted(task).startsWith(isVideo ? "video" : "image")) ?? fits[0];
    inputs.task.write(name);
    choose();
  }
  const blob = await (await fetch(resultOf(job))).blob();
  await inputs[wanted(about.tasks[inputs.task.read()])].send(new File([blob], job.path));
  scrollTo({ top: 0, behavior: "smooth" });
}

function draw(job) {
  const old = cards[job.id];
  if (old && old.job.status === job.status) {
    old.job = job;
    if (job.status === "running") old.card.querySelector(".stage").replaceChildren(...status(job));
    return;
  }
  const stage = make("div", { className: "stage" });
  if (job.status === "done") {
    Object.assign(stage.dataset, { path: resultOf(job), type: typeOf(job.path) });
    onScreen.observe(stage);
  } else stage.append(...status(job));
  const prompt = make("p", { className: "prompt", textContent: job.settings.prompt ?? "" });
  const card = make("article", { className: `card ${job.status}` }, stage, make("div", { className: "about" }, prompt, settings(job), act(job)));
  card.dataset.job = job.id;
  if (old) old.card.replaceWith(card); // only what is done is observed, and that is never replaced
  else $("jobs").prepend(card);
  cards[job.id] = { job, card };
}

async function refresh() {
  const state = await ask(`/state?queue=${queue}&after=${version}`);
  if (state.queue !== queue) {
    $("jobs").replaceChildren();
    for (const id in cards) delete cards[id];
  }
  ({ queue, version } = state);
  state.jobs.sort((a, b) => a.order - b.order).forEach(draw);
  if (state.jobs.length) {
    for (const { job, card } of Object.values(cards)) {
      if (job.status === "waiting") card.querySelector(".stage").replaceChildren(...status(job));
    }
  }
  $("empty").hidden = Object.keys(cards).length > 0;
}

async function watch() {
  try {
    await refresh();
    $("lost").hidden = true;
  } catch { $("lost").hidden = false; }
  const busy = Object.values(cards).some(({ job }) => ["waiting", "running"].includes(job.status));
  setTimeout(watch, busy ? 400 : 2000);
}

async function start() {
  try { about = await ask("/form"); } catch { $("lost").hidden = false; setTimeout(start, 2000); return; }
  $("lost").hidden = true;
  $("model").textContent = about.model;
  build();
  $("form").addEventListener("submit", submit);
  $("form").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit(); });
  watch();
}

start();
