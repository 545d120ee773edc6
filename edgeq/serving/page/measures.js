// Measurements and comparisons of answers, as words.

export const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

export function bytes(count) {
  if (count === null || count === undefined) return "no sensor";
  return count < 2 ** 30 ? `${Math.round(count / 2 ** 20)} MiB` : `${(count / 2 ** 30).toFixed(2)} GiB`;
}

// tokens per second after the first one, by the server's clock once the answer is complete
export function rate(own) {
  const timed = own.timings && own.timings.predicted_ms > 0;
  const taken = timed ? own.timings.predicted_ms / 1000 : own.seconds;
  const count = timed ? own.timings.predicted_n : own.tokens;
  return count > 1 && taken > 0 ? `${((count - 1) / taken).toFixed(1)} tok/s` : "–";
}

export function summary(own) {
  const reasons = { length: "ended at the token limit", stopped: "stopped" };
  const parts = [`${own.tokens} tokens`, rate(own)];
  if (own.first) parts.push(`first after ${seconds(own.first)}`);
  if (reasons[own.finish]) parts.push(reasons[own.finish]);
  return own.tokens ? parts.join(" · ") : "";
}

// how many words two texts have in common from the beginning
export function sameness(one, other) {
  if (one === other) return "Both answers are the same.";
  const [words, others] = [one, other].map((text) => text.trim().split(/\s+/));
  const end = words.findIndex((word, i) => word !== others[i]);
  const same = end < 0 ? words.length : end;
  if (!same) return "The answers differ from the first word on.";
  return same === 1 ? "The first word is the same." : `The first ${same} words are the same.`;
}
