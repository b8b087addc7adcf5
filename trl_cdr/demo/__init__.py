"""Two worlds with a hidden gold reward: a tiny one, from scratch in seconds, and a real language model.

The tiny world is a closed language of about 1,000 prompts in three domains, small enough to train a Llama of 116,000
parameters on a CPU and to judge every completion by rule. It lets `trl-cdr demo`, the examples and the tests run the
real pipeline (TRL's trainer, `CDRReward`, the scorer) with no download. It is not a benchmark: what holds here is a
check of the machinery and of the idea, not a claim about large models.

    world      prompts, right and wrong completions, the gold rules.      pure Python
    steering   criteria, exemplars and styles in that language.           pure Python
    models     tokenizer, training, the cached checkpoints, sampling.     torch + transformers
    story      the demo: accuracy of the ratio, three online DPO runs.    trl
    customize  the demo of criteria, on the steerable pair.               trl
    gaming     policies that may game the ratio.                          trl

The real world asks SmolLM2-135M-Instruct for sentences, under conditions that a program can check. Its pair is the
model, tuned by DPO on what it wrote itself, over the model: what is believed of the tiny world has to hold here too.

    real_world     requests, checks, the gold rules.                      pure Python
    smollm         the packaged model as a folder.                        transformers
    real_models    sampling, the pair, its cache.                         trl + peft
    real_labels, real_gate, real_training    what is measured.            trl + peft
    real           the demo and the long workload, part by part.          trl + peft

    cache      folders that are built once.                               transformers
    figure     the demos' figures.                                        matplotlib

Importing the package loads none of them.
"""
