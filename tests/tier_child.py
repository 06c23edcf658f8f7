"""A process that generates with pages on a disk and saves its session now and then, to be killed at any
moment: ``python tier_child.py JOB``, JOB a JSON object. It prints position and id of each token."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import edgert


def main() -> None:
    job = json.loads(sys.argv[1])
    saved, prompt = Path(job["saved"]), job["prompt"]
    with (
        edgert.load(
            job["path"],
            attention="sparse",
            budget=job["budget"],
            memory=job["memory"],
            context=job["context"],
            page_directory=job["pages"],
            head="dense",
        ) as model,
        model.session() as session,
    ):
        unending = dict.fromkeys(model.tokenizer.eos_ids, -math.inf)
        if saved.exists():
            session.restore(saved)
        # A reply's last token is no part of the cache: it is the first of the next request.
        told = len(session.tokens) + 1 if session.tokens else len(prompt)
        text = [*prompt, *job["known"][: told - len(prompt)]]
        while len(text) < len(prompt) + job["tokens"]:
            for piece in session.stream(text, max_tokens=job["each"], logit_bias=unending):
                text.append(piece.token)
                print(len(text) - 1, piece.token, flush=True)
            session.save(saved)
        print("done", json.dumps(session._sequence.tier), flush=True)


if __name__ == "__main__":
    main()
