"""The steps of a package's README: what an app's developer does, platform by platform."""

from __future__ import annotations

from pathlib import Path

from edgeq.packaging.manifest import Manifest


def steps(made: Manifest, folder: Path) -> str:
    """The steps for a package, as Markdown.

    Args:
        made: what the package holds.
        folder: of the package.
    """
    kind = "graph" if made.kind == "graph" else "model"
    return _STEPS[made.platform, kind](made)


def _rpi_model(made: Manifest) -> str:
    name = made.name
    path, asked, page = (
        ("chat/completions", '"messages": [{"role": "user", "content": "Hello"}]',
         "A page to chat with it is at http://127.0.0.1:8080/ in a browser on the Pi. Programs that "
         "know\n   OpenAI's API take `http://127.0.0.1:8080/v1` as their base URL.")
        if made.model["chat"]
        else ("completions", '"prompt": "Once upon a time"',
              "Programs that know OpenAI's API take `http://127.0.0.1:8080/v1` as their base URL. "
              "The model has\n   no chat template: it continues texts, and does not hold "
              "conversations.")
    )  # fmt: skip
    return f"""\
1. Copy this folder to the Pi, for example with `scp -r {name} pi@raspberrypi.local:`. It needs a
   64-bit Raspberry Pi OS (bookworm or later) and about 600 MB of free space for Python packages.
2. On the Pi, install it. This makes an environment of its own, installs packages whose SHA-256 is
   listed here, compiles the kernels for the processor, and runs the golden tests:

   ```
   cd {name}
   sudo ./install.sh
   ```

3. Ask it something:

   ```
   curl http://127.0.0.1:8080/v1/{path} -H 'Content-Type: application/json' \\
     -d '{{{asked}, "max_tokens": 50}}'
   ```

   {page}

The server starts at every boot. `systemctl status {name}` shows it, `journalctl -u {name}` its
log, `/opt/{name}/package/healthcheck.sh --ask` whether it writes. Settings go into
`/etc/default/{name}`, one a line; to let other machines of your network in:

```
HOST=0.0.0.0
EDGEQ_SERVE_API_KEY=choose-a-long-one
```

Without `sudo`, `./install.sh` installs into `~/.local/share/{name}`, and `run.sh` there starts the
server. Without a network, fetch the wheels that `requirements.txt` names on another machine and give
`PIP_ARGS="--no-index --find-links FOLDER"`."""


def _rpi_graph(made: Manifest) -> str:
    name = made.name
    first = made.model["inputs"][0]["name"]
    return f"""\
1. Copy this folder to the Pi, for example with `scp -r {name} pi@raspberrypi.local:`. It needs a
   64-bit Raspberry Pi OS (bookworm or later).
2. On the Pi, install ONNX Runtime and NumPy into an environment beside the folder, and run the golden
   tests:

   ```
   cd {name}
   ./install.sh
   ```

3. Use it in a program that lies in this folder, or has it on its path:

   ```
   import numpy
   import run

   model = run.Model()
   outputs = model({{"{first}": numpy.zeros({made.model["inputs"][0]["shape"]}, "float32")}})
   ```

There is no service, as the model is called from your program and does not listen on the network."""


def _ort_model(made: Manifest) -> str:
    return """\
The folder `model` is what onnxruntime-genai loads: the model with its data file,
`genai_config.json` and the tokenizer.

1. Add the libraries to the app. On Android put `onnxruntime-genai-android` (an AAR of
   onnxruntime-genai's releases) and `com.microsoft.onnxruntime:onnxruntime-android` into the app's
   dependencies; on iOS take the pods `onnxruntime-genai-objc` and `onnxruntime-objc`; on a board
   `pip install onnxruntime-genai`.
2. Copy the folder `model` to the app's own files, as the library reads it from a folder.
3. Load it and write. In Python, which has the same calls as the other languages:

   ```
   import onnxruntime_genai as og

   model = og.Model("model")
   tokenizer = og.Tokenizer(model)
   parameters = og.GeneratorParams(model)
   parameters.set_search_options(max_length=200)
   generator = og.Generator(model, parameters)
   generator.append_tokens(tokenizer.encode("Once upon a time"))
   stream = tokenizer.create_stream()
   while not generator.is_done():
       generator.generate_next_token()
       print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
   ```

4. To make the library smaller, build onnxruntime with the operators that this model has alone:
   `./build.sh android SOURCES` (or `ios`, `linux`), then onnxruntime-genai with that build
   (`--ort_home`). `build.sh` says what it needs. It was not run when this package was made; the
   operators in `required_operators.config` are those of the model."""


def _ort_graph(made: Manifest) -> str:
    entry = made.variants[0].entry
    return f"""\
1. Build an onnxruntime that has only what this model needs: `./build.sh android SOURCES` (or `ios`,
   `linux`), where SOURCES is a checkout of onnxruntime at the tag that `build.sh` names. It says
   what else it needs. It was not run when this package was made; the operators in
   `required_operators.config` were written by onnxruntime's own tool. The whole library from its
   release (`com.microsoft.onnxruntime:onnxruntime-android`, the pod `onnxruntime-objc`,
   `pip install onnxruntime`) reads the file as well, and needs no build.
2. Put `{entry}` into the app's assets, and load it with `OrtSession`:

   ```
   val environment = OrtEnvironment.getEnvironment()
   val session = environment.createSession(assets.open("{Path(entry).name}").readBytes())
   ```

3. Feed the inputs that are listed above, in that order of axes, and compare once with the arrays in
   `golden`: `golden/inputs.json` says which files belong together, `golden/{made.variants[0].id}.json`
   by how much the outputs may differ."""


_STEPS = {
    ("rpi", "model"): _rpi_model,
    ("rpi", "graph"): _rpi_graph,
    ("ort-mobile", "model"): _ort_model,
    ("ort-mobile", "graph"): _ort_graph,
}
