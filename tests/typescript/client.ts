// Calls the server at the first argument with the clip at the second, by the types of docs/openapi.yaml.
import { readFile } from "node:fs/promises";

import createClient from "openapi-fetch";

import type { components, paths } from "./api.js";

const [baseUrl = "", path = ""] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl, headers: { "Content-Type": "application/octet-stream" } });
const clip = await readFile(path);

// A file has the type string in OpenAPI; its bytes are sent as they are.
const sent = (bytes: Uint8Array) => ({ body: bytes as unknown as string, bodySerializer: () => bytes });

type Captions = components["schemas"]["Captions"];
type Segments = components["schemas"]["Segments"];
type Answer = Captions | Segments | string | undefined;

function captions(answer: Answer): Captions {
  if (typeof answer === "object" && "caption" in answer) return answer;
  throw new Error("no captions");
}

function segments(answer: Answer): Segments {
  if (typeof answer === "object" && "segments" in answer) return answer;
  throw new Error("no segments");
}

const whole = captions(
  (await client.PUT("/predictions/etenet", { params: { header: { "X-Etenet-Captions": 2 } }, ...sent(clip) })).data,
);
const explained = captions((await client.POST("/explanations/etenet", sent(clip))).data);
const cut = segments(
  (await client.PUT("/predictions/etenet", { params: { header: { "X-Etenet-Segment-S": 1 } }, ...sent(clip) })).data,
);
const refused = await client.PUT("/predictions/etenet", sent(new TextEncoder().encode("no video")));

console.log(
  JSON.stringify({
    caption: whole.caption,
    sentences: whole.captions.length,
    attention: explained.captions[0]?.attention?.[0]?.length,
    segments: cut.segments.map((segment) => segment.caption),
    refused: [refused.response.status, refused.error?.error.code],
  }),
);
