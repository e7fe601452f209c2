"""A reward as a server: `sfgrpo serve-reward NAME --port 8000`.

It runs in the environment of its reward, which need not be the trainer's: `pip install ".[serve]"`
and what the reward imports. NAME is a reward of this package, or "module:function" of a file where
the command is given.

    command.py   the command: arguments, address, token
    app.py       requests and answers
    device.py    the reward, one batch at a time, and the queue before it
    counts.py    numbers for Prometheus

The protocol is `sfgrpo.remote.wire`. A reward of Flow-GRPO, whose own servers speak pickle, is
served by a function of five lines in a file of one's own, `sfgrpo serve-reward mine:pickscore`:

    def pickscore(device="cuda"):
        from flow_grpo.rewards import pickscore_score

        score = pickscore_score(device)
        return lambda images, prompts, metadata: score(images, prompts, metadata)[0]
"""
