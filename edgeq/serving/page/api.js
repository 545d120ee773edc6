// Requests to the server, and the events of its streams.

export const STORE = "edgeq-chat";

// The API key lasts as long as the tab; the page says what happens where the server refuses it.
export const key = {
  value: sessionStorage.getItem(STORE + "-key") ?? "",
  refused: () => {},
  set(text) {
    this.value = text;
    sessionStorage.setItem(STORE + "-key", text);
  },
};

function headers() {
  const found = { "Content-Type": "application/json" };
  if (key.value) found.Authorization = `Bearer ${key.value}`;
  return found;
}

export async function fetched(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no error of the API
  }
  if (response.status === 401) key.refused();
  throw new Error(message);
}

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}
