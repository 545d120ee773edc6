// The chat page. Everything that a model or a person writes reaches the document as text nodes.

import { STORE, events, fetched, key } from "./api.js";
import { node, phone, report } from "./drawers.js";
import { copyText, markdown } from "./markdown.js";
import { bytes, rate, sameness, seconds, summary } from "./measures.js";

const IDEAS = ["Explain gravity to a child.", "Write a haiku about small computers.",
  "Give me a table of three planets and their moons."];
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const $ = (id) => document.getElementById(id);

// What is kept between visits: turns of {user, answers: [answer of each column]}, and settings.
const state = { turns: [], columns: ["", ""], two: false, settings: {} };
let models = [];
let running = []; // AbortControllers of the answers that are being written
let leaving = false; // the browser ends the answers of a page that is left

// --- talking to the server -------------------------------------------------------------------

function request(column, turn) {
  const model = models.find((one) => one.id === state.columns[column]);
  const settings = state.settings;
  const body = { model: model.id, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (settings[name] !== undefined && settings[name] !== null) body[name] = settings[name];
  // with the same random numbers, what differs between two models is not chance
  if (state.two && body.seed === undefined) body.seed = turn.seed;
  if (settings.schema) {
    const schema = { name: "answer", schema: JSON.parse(settings.schema) };
    body.response_format = { type: "json_schema", json_schema: schema };
  }
  const before = state.turns.slice(0, state.turns.indexOf(turn));
  if (!model.chat_template) {
    delete body.response_format;
    return ["/v1/completions", { max_tokens: 256, ...body, prompt: turn.user }];
  }
  const messages = [];
  if (settings.system) messages.push({ role: "system", content: settings.system });
  for (const one of before) {
    const said = (one.answers[column] ?? one.answers[0])?.text;
    if (!said) continue; // the answer failed, or was stopped before its first word
    messages.push({ role: "user", content: one.user });
    messages.push({ role: "assistant", content: said });
  }
  messages.push({ role: "user", content: turn.user });
  if (settings.thinking === false) body.chat_template_kwargs = { enable_thinking: false };
  return ["/v1/chat/completions", { ...body, messages }];
}

async function answer(turn, column) {
  const own = { model: state.columns[column], text: "", thought: "", error: "", tokens: 0 };
  turn.answers[column] = own;
  const control = new AbortController();
  running.push(control);
  leaving = false;
  busy();
  const view = answerView(turn, column);
  view.show(true);
  const started = performance.now();
  let first = null;
  try {
    const [path, body] = request(column, turn);
    const response = await fetched(path, { method: "POST", body: JSON.stringify(body), signal: control.signal });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) {
        own.tokens = event.usage.completion_tokens;
        own.used = event.usage.total_tokens;
      }
      if (event.timings) own.timings = event.timings;
      const choice = event.choices[0];
      if (!choice) continue;
      const said = choice.text ?? choice.delta?.content ?? "";
      const thought = choice.delta?.reasoning_content ?? "";
      if (said || thought) {
        if (first === null) {
          first = performance.now();
          own.first = first - started;
        }
        own.tokens += 1;
        own.text += said;
        own.thought += thought;
        own.seconds = (performance.now() - first) / 1000;
        view.soon();
        measures(own);
      }
      if (choice.finish_reason) own.finish = choice.finish_reason;
    }
  } catch (fault) {
    if (fault.name === "AbortError" || leaving) own.finish = "stopped";
    else own.error = fault.message;
  } finally {
    running = running.filter((one) => one !== control);
    view.show(false);
    compare(turn);
    measures(own);
    busy();
    save();
    $("status").textContent = own.error ? `Error: ${own.error}` : running.length ? "" : "The answer is complete.";
    live();
  }
}

const newSeed = () => Math.floor(Math.random() * 2 ** 31);

function columns() {
  return state.two ? [0, 1] : [0];
}

function say(text) {
  const turn = { user: text, answers: [], seed: newSeed() };
  state.turns.push(turn);
  $("talk").append(turnView(turn));
  $("empty").hidden = true;
  pinned = true;
  for (const column of columns()) answer(turn, column);
  save();
}

// everything after a turn answers something that is no longer said
function again(turn, text, only = null) {
  stop();
  const place = state.turns.indexOf(turn);
  state.turns.splice(place + 1);
  turn.user = text;
  turn.seed = newSeed();
  if (only === null) turn.answers = [];
  draw();
  for (const column of only === null ? columns() : [only]) answer(turn, column);
}

function stop() {
  for (const one of running) one.abort();
}

// --- what is shown ---------------------------------------------------------------------------

let pinned = true; // the conversation follows what is written, until somebody scrolls up

function tool(label, about, act) {
  const made = node("button", "tool", label);
  made.type = "button";
  made.setAttribute("aria-label", about);
  made.addEventListener("click", () => act(made));
  return made;
}

const views = new Map(); // turn -> a view of each answer

function turnView(turn) {
  const mine = node("div", "mine", turn.user);
  mine.setAttribute("role", "group");
  mine.setAttribute("aria-label", "You");
  const tools = node("div", "mine-tools", tool("Edit", "Edit this message", () => edit(turn, mine, tools)));
  const answers = node("div", "answers");
  const difference = node("p", "difference");
  const section = node("section", "turn", mine, tools, answers, difference);
  section.setAttribute("aria-label", "Turn");
  views.set(turn, { difference });
  for (const column of columns()) {
    const view = makeAnswer(turn, column);
    views.get(turn)[column] = view;
    answers.append(view.box);
    if (turn.answers[column]) view.show(false);
    else view.box.hidden = true;
  }
  compare(turn);
  return section;
}

// says how far two complete answers are the same
function compare(turn) {
  const place = views.get(turn)?.difference;
  if (!place) return;
  const [one, other] = state.two ? turn.answers : [];
  place.hidden = !(one?.finish && other?.finish);
  if (!place.hidden) place.textContent = sameness(one.text, other.text);
}

function answerView(turn, column) {
  const view = views.get(turn)[column];
  view.box.hidden = false;
  return view;
}

function makeAnswer(turn, column) {
  const name = node("h2");
  const label = state.two ? "Regenerate both" : "Regenerate";
  const thought = node("div");
  const thinking = node("details", "thought", node("summary", "", "Thought"), thought);
  const text = node("div", "text");
  const fault = node("p", "fault");
  const said = node("span");
  const foot = node("div", "foot", said,
    tool(label, state.two ? "Regenerate both answers" : "Regenerate this answer",
      () => again(turn, turn.user, state.two ? null : column)),
    tool("Copy", "Copy this answer", (button) => copyText(turn.answers[column].text, button)));
  const box = node("article", "answer", name, thinking, text, fault, foot);
  let asked = false;
  let writing = false;
  const show = (now = writing) => {
    writing = now;
    const own = turn.answers[column];
    if (!own) return;
    const model = models.find((one) => one.id === own.model);
    name.replaceChildren(own.model, ...(model ? [node("span", "size", ` ${bytes(model.weights_bytes)}`)] : []));
    name.hidden = !state.two && models.length < 2;
    box.classList.toggle("waiting", writing && !own.text);
    box.setAttribute("aria-busy", String(writing));
    thinking.hidden = !own.thought.trim();
    thinking.open = writing && !own.text;
    thought.replaceChildren(...markdown(own.thought));
    text.replaceChildren(...markdown(own.text));
    fault.textContent = own.error;
    fault.hidden = !own.error;
    foot.hidden = writing;
    said.textContent = summary(own);
    if (pinned) $("talk").scrollTop = $("talk").scrollHeight;
  };
  const soon = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      show();
    });
  };
  return { box, show, soon };
}

function edit(turn, mine, tools) {
  const field = node("textarea");
  field.value = turn.user;
  field.rows = Math.min(10, turn.user.split("\n").length + 1);
  field.setAttribute("aria-label", "Your message");
  const send = node("button", "", "Send again");
  const leave = node("button", "", "Keep as it was");
  send.type = leave.type = "button";
  const form = node("div", "edit", field, node("div", "", leave, send));
  const back = () => {
    form.replaceWith(mine);
    tools.hidden = false;
    tools.firstChild.focus();
  };
  leave.addEventListener("click", back);
  send.addEventListener("click", () => field.value.trim() && again(turn, field.value.trim()));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") back();
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send.click();
    }
  });
  tools.hidden = true;
  mine.replaceWith(form);
  fit(field);
  field.focus();
}

function draw() {
  views.clear();
  $("talk").replaceChildren($("empty"), ...state.turns.map(turnView));
  $("talk").classList.toggle("two", state.two);
  $("empty").hidden = state.turns.length > 0;
}

function busy() {
  const writing = running.length > 0;
  $("stop").hidden = !writing;
  $("send").hidden = writing;
}

// --- measurements ----------------------------------------------------------------------------

function measures(own) {
  $("speed").textContent = rate(own);
  $("first").textContent = own.first ? seconds(own.first) : "–";
  const model = models.find((one) => one.id === own.model);
  if (own.used && model) $("context").textContent = `${own.used} of ${model.context}`;
}

let polling = null;

async function live() {
  clearTimeout(polling);
  if (document.hidden) return;
  try {
    const props = await (await fetched("/props")).json();
    const now = props.live;
    $("memory").textContent = bytes(now.resident_bytes);
    for (const [name, value] of [["heat", now.temperature_c], ["power", now.watts]])
      $(name).parentElement.classList.toggle("absent", value === null);
    $("heat").textContent = now.temperature_c === null ? "no sensor" : `${now.temperature_c.toFixed(0)} °C`;
    $("power").textContent = now.watts === null ? "no sensor" : `${now.watts.toFixed(1)} W`;
    $("power").title = now.watts_cover ?? "";
  } catch {
    $("memory").textContent = "no connection";
  }
  polling = setTimeout(live, 5000);
}

// --- settings --------------------------------------------------------------------------------

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // a full or forbidden store only forgets
  }
}

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "{}");
    if (Array.isArray(kept.turns)) Object.assign(state, kept);
    for (const own of state.turns.flatMap((turn) => turn.answers)) {
      if (own && !own.finish && !own.error) own.finish = "stopped"; // by leaving the page
    }
  } catch {
    // what cannot be read is forgotten
  }
}

function readSettings() {
  const found = { system: $("system").value.trim(), thinking: $("thinking").checked };
  for (const name of NUMBERS) found[name] = $(name).value === "" ? null : Number($(name).value);
  const text = $("schema").value.trim();
  let fault = "";
  try {
    if (text) JSON.parse(text);
    found.schema = text;
  } catch (error) {
    fault = `This is not JSON: ${error.message}`;
  }
  $("schema-fault").textContent = fault;
  state.settings = found;
  for (const output of document.querySelectorAll("output")) output.textContent = $(output.htmlFor.value).value;
  if ($("key").value !== key.value) {
    key.set($("key").value);
    start();
  }
  save();
}

function writeSettings(defaults) {
  const held = state.settings;
  for (const name of NUMBERS) $(name).value = held[name] ?? (name in held ? "" : defaults[name] ?? "");
  if (!("max_tokens" in held)) $("max_tokens").value = 512;
  $("system").value = held.system ?? "";
  $("schema").value = held.schema ?? "";
  $("thinking").checked = held.thinking ?? true;
  $("key").value = key.value;
  readSettings();
}

function open(which, shown) {
  for (const name of ["settings", "report", "phone"]) {
    const now = name === which && shown;
    $(name).hidden = !now;
    $(`${name}-button`).setAttribute("aria-expanded", String(now));
  }
}

const showReport = () => report($("report-text"), columns().map((column) => state.columns[column]));

function choices() {
  for (const [column, id] of [[0, "model"], [1, "other"]]) {
    $(id).replaceChildren(...models.map((one) => {
      const option = node("option", "", one.id);
      option.value = one.id;
      return option;
    }));
    if (!models.some((one) => one.id === state.columns[column])) state.columns[column] = (models[column] ?? models[0]).id;
    $(id).value = state.columns[column];
  }
  $("other-label").hidden = !state.two;
  $("compare").hidden = models.length < 2;
  $("compare").setAttribute("aria-pressed", String(state.two));
  const model = models.find((one) => one.id === state.columns[0]);
  const size = `${bytes(model.weights_bytes)} of weights, ${model.context} tokens of context`;
  $("about").textContent = model.chat_template ? size : `${size}. It has no chat template: it continues your text.`;
}

async function start() {
  try {
    const props = await (await fetched("/props")).json();
    models = props.models;
    if (models.length < 2) state.two = false;
    choices();
    draw();
    writeSettings(props.default_generation_settings);
    $("send").disabled = false;
  } catch (fault) {
    $("about").textContent = fault.message;
    $("send").disabled = true;
  }
  live();
}

// --- events ----------------------------------------------------------------------------------

// a field is as high as its text
function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value.trim();
  if (!text || running.length || !models.length) return;
  $("message").value = "";
  fit($("message"));
  say(text);
});
$("message").addEventListener("input", () => fit($("message")));
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running.length) stop();
  else open("", false);
});
$("stop").addEventListener("click", () => {
  stop();
  $("message").focus();
});
$("new").addEventListener("click", () => {
  stop();
  state.turns = [];
  draw();
  save();
  $("message").focus();
});
$("compare").addEventListener("click", () => {
  stop();
  state.two = !state.two;
  choices();
  draw();
  save();
});
for (const [column, id] of [[0, "model"], [1, "other"]]) {
  $(id).addEventListener("change", () => {
    state.columns[column] = $(id).value;
    choices();
    save();
    if (!$("report").hidden) showReport();
  });
}
$("settings-button").addEventListener("click", () => open("settings", $("settings").hidden));
$("report-button").addEventListener("click", () => {
  open("report", $("report").hidden);
  if (!$("report").hidden) showReport();
});
$("phone-button").addEventListener("click", () => {
  open("phone", $("phone").hidden);
  if (!$("phone").hidden) phone($("phone-codes"));
});
for (const button of document.querySelectorAll(".close")) {
  button.addEventListener("click", () => {
    open("", false);
    $(`${button.dataset.closes}-button`).focus();
  });
}
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  readSettings();
});
$("settings").addEventListener("change", readSettings);
$("settings").addEventListener("input", (event) => event.target.type === "range" && readSettings());
$("talk").addEventListener("scroll", () => {
  const talk = $("talk");
  pinned = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) save(); // a phone may end a page that is not shown
  live();
});
for (const event of ["beforeunload", "pagehide"]) {
  addEventListener(event, () => {
    leaving = true;
    save();
  });
}
for (const idea of IDEAS) {
  const button = node("button", "", idea);
  button.type = "button";
  button.addEventListener("click", () => models.length && !running.length && say(idea));
  $("ideas").append(button);
}

key.refused = () => {
  open("settings", true);
  $("key").focus();
};
restore();
start();
