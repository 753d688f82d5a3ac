"""Compares answers through a real vLLM server with the module's own: on real prompts, by client and gateway.

It starts the server and ``lopa serve`` (tests/serving/vllm_server.py says what for), and writes a table::

    LOPA_VLLM_PYTHON=~/vllm/bin/python python -m tests.serving.proof [--items 50] [--sentences 200] [--tokens 32]

Completions are CRUXEval-O's, chats are banking77's questions, every second one with a turn before it, and sentences
are SST-2's; soft prompts are those of LoPA on MiniLM's vectors, moved away from their initial values.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import openai
import torch
from lightning.pytorch import Trainer

from lopa_lightning import (
    Bundle,
    CausalLMModule,
    ClassificationModule,
    InstanceEncoderSpec,
    LoPA,
    LoPAClient,
    PretrainedSpec,
    ServedPrompter,
    TextClassificationDataModule,
)
from lopa_lightning.serving import export
from tests.conftest import REAL_DATA, REAL_MODELS
from tests.serving.vllm_server import missing, vllm_server

MODEL, ENCODER = (
    REAL_MODELS / name for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2")
)
AT_ONCE = 16


def main() -> None:
    """Starts the server, asks it, and writes what was equal."""
    options = argparse.ArgumentParser("python -m tests.serving.proof", description=__doc__)
    options.add_argument("--items", type=int, default=50, help="completions, and chats")
    options.add_argument("--sentences", type=int, default=200, help="that are labelled")
    options.add_argument("--tokens", type=int, default=32, help="generated for each")
    options.add_argument("--json", type=Path, default=Path("runs/proof.json"), help="what is written")
    given = options.parse_args()
    if (why := missing()) is not None:
        options.error(why)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    models = {
        "completions": generator("before", given.tokens),
        "system": generator("system", given.tokens),
        "user": generator("user", given.tokens),
        "sst2": classifier(),
    }
    asked = {
        "completions": completions(given.items),
        "system": chats(given.items),
        "user": chats(given.items),
        "sst2": sentences(given.sentences),
    }
    wanted = {name: own_answers(models[name], prompts) for name, prompts in asked.items()}
    asked["code"], wanted["code"] = asked["completions"], own_answers(models["system"], asked["completions"])
    with tempfile.TemporaryDirectory() as folder, vllm_server(str(MODEL)) as server:
        folders = {name: written(model, Path(folder) / name) for name, model in models.items()}
        folders["code"] = folders["system"]
        with gateway(server, folders) as address:
            table = proof(server, address, folders, asked, wanted, given.tokens)
    given.json.write_text(json.dumps(table, indent=2))
    print("\n| answers | through | equal | of | seconds |\n|-|-|-:|-:|-:|")
    for row in table:
        print("| {answers} | {through} | {equal} | {of} | {seconds:.0f} |".format_map(row))
    sys.exit(any(row["equal"] != row["of"] for row in table))


def proof(
    server: str,
    address: str,
    folders: Mapping[str, Path],
    asked: Mapping[str, list[Any]],
    wanted: Mapping[str, list[Any]],
    tokens: int,
) -> list[dict[str, Any]]:
    """Asks client and gateway for each bundle's answers alone, then the gateway for all of them mixed with plain ones."""
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": tokens}
    stock = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    through = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    table: list[dict[str, Any]] = []

    def row(answers: str, way: str, ask: Callable[[], list[Any]], right: Sequence[Any]) -> None:
        start = time.perf_counter()
        found = ask()
        equal = sum(one == other for one, other in zip(found, right, strict=True))
        table.append({"answers": answers, "through": way, "equal": equal, "of": len(right)})
        table[-1]["seconds"] = time.perf_counter() - start
        print(table[-1], flush=True)

    def each(ask: Callable[[Any], Any], prompts: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, prompts))

    def of_gateway(name: str, prompt: Any) -> Any:
        if name == "completions":
            return through.completions.create(model=name, prompt=prompt, **greedy).choices[0].text
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        options = {} if name == "sst2" else greedy
        return through.chat.completions.create(model=name, messages=messages, **options).choices[0].message.content

    def plain(prompt: Any) -> Any:
        if isinstance(prompt, list):
            return stock.chat.completions.create(model=str(MODEL), messages=prompt, **greedy).choices[0].message.content
        return stock.completions.create(model=str(MODEL), prompt=prompt, **greedy).choices[0].text

    def plain_through(prompt: Any) -> Any:
        if isinstance(prompt, list):
            made = through.chat.completions.create(model=str(MODEL), messages=prompt, **greedy)
            return made.choices[0].message.content
        return through.completions.create(model=str(MODEL), prompt=prompt, **greedy).choices[0].text

    for name, folder in folders.items():
        client = LoPAClient(server, ServedPrompter(Bundle.from_pretrained(str(folder)), max_prompt_bytes=2**22))
        if name == "sst2":
            row(name, "client", lambda: [each["label"] for each in client.classify(asked[name])], wanted[name])
        elif name == "completions":
            row(name, "client", lambda: [one.choices[0].text for one in client.map(asked[name], **greedy)], wanted[name])
        else:
            ask = functools.partial(client.chat, **greedy)
            row(
                name,
                "client",
                lambda: each(lambda prompt: ask(prompt).choices[0].message.content, asked[name]),
                wanted[name],
            )
        client.close()
        row(name, "gateway", lambda: each(functools.partial(of_gateway, name), asked[name]), wanted[name])
    prompts = [*asked["system"][:25], *asked["completions"][:25]]
    own = each(plain, prompts)
    row("plain", "gateway", lambda: each(plain_through, prompts), own)
    mixed = [(name, prompt, right) for name in folders for prompt, right in zip(asked[name][:50], wanted[name])]
    mixed += [("", prompt, right) for prompt, right in zip(prompts, own)]
    mixed = [mixed[index] for index in torch.randperm(len(mixed), generator=torch.manual_seed(0)).tolist()]
    row(
        f"all of them mixed, {AT_ONCE} at a time",
        "gateway",
        lambda: each(lambda one: of_gateway(one[0], one[1]) if one[0] else plain_through(one[1]), mixed),
        [right for _, _, right in mixed],
    )
    return table


def completions(count: int) -> list[str]:
    """Returns CRUXEval-O's questions: a program and the beginning of an assertion on it."""
    rows = datasets.load_dataset(str(REAL_DATA / "cruxeval-org/cruxeval"), split="test").select(range(count))
    return [f"{row['code']}\n\nassert f({row['input']}) ==" for row in rows]


def chats(count: int) -> list[list[dict[str, str]]]:
    """Returns chats on banking77's questions, every second one with a turn before it."""
    with (REAL_DATA / "PolyAI/banking77/test.csv").open(newline="") as file:
        questions = [row["text"] for row in csv.DictReader(file)]
    asked = [{"role": "user", "content": question} for question in questions[:: len(questions) // (count + 1)][:count]]
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How can I help?"}]
    return [[*turn, question] if index % 2 else [question] for index, question in enumerate(asked)]


def sentences(count: int) -> list[str]:
    """Returns the first sentences of SST-2's validation split."""
    rows = datasets.load_dataset(str(REAL_DATA / "nyu-mll/glue"), "sst2", split="validation")
    return [row["sentence"].strip() for row in rows.select(range(count))]


def moved(model: Any) -> Any:
    """Returns the module with prompts that are far from their initial values, and others for each text."""
    model.configure_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model._net().prompt_encoder.parameters():
            parameter += 0.3 * parameter.std(correction=0) * torch.randn_like(parameter)
    model.learned = True
    return model.eval()


def _parts() -> dict[str, Any]:
    return {
        "backbone": PretrainedSpec(str(MODEL), dtype="float32"),
        "prompt_encoder": functools.partial(LoPA, num_virtual_tokens=10, rank=4, hidden_dim=64),
        "instance_encoder": InstanceEncoderSpec(str(ENCODER), pooling="mean"),
    }


def generator(placement: str, tokens: int) -> Any:
    """Returns a module that generates."""
    return moved(CausalLMModule(**_parts(), placement=placement, generation={"max_new_tokens": tokens}))


def classifier() -> Any:
    """Returns a module that has SST-2's labels and words."""
    model = ClassificationModule(**_parts(), objective="causal_lm", placement="system")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.csv"
        rows.write_text("text,label\na dull film,negative\ngreat fun,positive\n")
        data = TextClassificationDataModule(
            data_files=dict.fromkeys(("train", "test"), str(rows)),
            labels=["negative", "positive"],
            words=["no", "yes"],
            template=["{text}\nIs that praise? {mask}"],
        )
        model.learned = True
        Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False).predict(model, data)
    return moved(model)


def own_answers(model: Any, prompts: list[Any]) -> list[Any]:
    """Returns what the module answers by itself."""
    with torch.no_grad():
        if isinstance(model, ClassificationModule):
            return [record["label"] for record in model.predict(prompts)]
        return [text for (text,) in model.generate(prompts)]


def written(model: Any, folder: Path) -> Path:
    """Returns the folder of the module's bundle."""
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    Bundle(export._config(model, {}, {}), tensors, "", [], None).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def gateway(server: str, folders: Mapping[str, Path]) -> Iterator[str]:
    """Runs ``lopa serve`` until the block ends, and yields its address."""
    command = [sys.executable, "-m", "lopa_lightning", "serve", "--upstream", server, "--port", "0"]
    command += [f"--bundle={name}={folder}" for name, folder in folders.items()]
    command += ["--max_prompt_bytes", str(2**22)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as running:
        assert running.stdout is not None
        ready = re.search(r"at (http://\S+)/v1", running.stdout.readline())
        if ready is None:
            raise RuntimeError("lopa serve did not start")
        try:
            yield ready[1]
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait(60)


if __name__ == "__main__":
    main()
