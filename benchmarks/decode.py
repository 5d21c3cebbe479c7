"""Time greedy generation by jaxlm against `transformers`' generate in torch, from the same random weights.

GPT-2's architecture in float32; every prompt has as many tokens, every text as many new ones. Each side lives in a process
of its own, and they take turns, so that what slows the machine down for a while slows both. Before anything is timed, the
texts are compared: they must agree in their first tokens.

    python benchmarks/decode.py --batches 1 8 32 --rounds 3
"""

import argparse
import multiprocessing as mp
import os
import pathlib
import statistics
import tempfile
import time
from importlib import metadata

import numpy as np

AGREE = 8
"""First new tokens that must be the same: later ones may part where two are all but equally likely."""


def prompts_of(batch, args):
    return np.random.default_rng(batch).integers(0, args.vocab, (batch, args.prompt)).tolist()


def torch_side(pipe, folder, args):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": args.layers, "n_embd": args.width, "n_head": args.heads, "vocab_size": args.vocab, "n_positions": 1024}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # loud enough for the likeliest token to be clear
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    model.save_pretrained(folder)
    pipe.send("ready")

    def generate(batch):
        prompt = torch.tensor(prompts_of(batch, args))
        with torch.inference_mode():
            found = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.new, do_sample=False, use_cache=True
            )
        return found[:, args.prompt :].tolist()

    serve(pipe, generate)


def jaxlm_side(pipe, folder, args):
    from jaxlm import host

    os.environ.setdefault("JAX_PLATFORMS", args.platform)
    host.prepare()
    import jax

    from jaxlm.generate import BatchGenerator, DecodeConfig
    from jaxlm.hub import load_parameters, read_config
    from jaxlm.model import Model
    from jaxlm.parallel import ParallelConfig, make_mesh

    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    model = Model(read_config(folder))
    params = load_parameters(folder, model, mesh)
    generator = BatchGenerator(model, mesh, args.vocab, pad_id=0)
    pipe.send("ready")

    def generate(batch):
        return generator(params, prompts_of(batch, args), DecodeConfig(max_tokens=args.new), [], batch_size=batch)

    serve(pipe, generate)


def serve(pipe, generate):
    while (batch := pipe.recv()) is not None:
        began = time.perf_counter()
        texts = generate(batch)
        pipe.send((time.perf_counter() - began, texts))


def ask(pipe, batch):
    pipe.send(batch)
    return pipe.recv()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="prompts at a time")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each text")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side, in turns")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--platform", default="cpu", help="JAX's platform")
    args = parser.parse_args()
    context = mp.get_context("spawn")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    print(f"{args.layers}x{args.width}, {args.prompt} + {args.new} tokens, greedy, float32; {versions}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pipes = {}
        for name, side in (("torch", torch_side), ("jaxlm", jaxlm_side)):
            pipes[name], theirs = context.Pipe()
            context.Process(target=side, args=(theirs, pathlib.Path(folder), args), daemon=True).start()
            assert pipes[name].recv() == "ready"
        for batch in args.batches:
            texts = {name: ask(pipe, batch)[1] for name, pipe in pipes.items()}  # compiles too
            same = [ours[:AGREE] == theirs[:AGREE] for ours, theirs in zip(texts["jaxlm"], texts["torch"], strict=True)]
            if not all(same):
                raise SystemExit(f"{same.count(False)} of {batch} texts differ in their first {AGREE} tokens")
            rounds = [{name: ask(pipe, batch)[0] for name, pipe in pipes.items()} for _ in range(args.rounds)]
            speed = {name: statistics.median(batch * args.new / one[name] for one in rounds) for name in pipes}
            ratios = sorted(one["torch"] / one["jaxlm"] for one in rounds)
            print(
                f"batch {batch}: jaxlm {speed['jaxlm']:.1f} tokens/s, torch {speed['torch']:.1f} tokens/s, jaxlm / torch "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )
        for pipe in pipes.values():
            pipe.send(None)


if __name__ == "__main__":
    main()
