"""The tiny world: a strong/weak pair and a policy trained from scratch in seconds, with a hidden gold reward.

It is a closed language of about 1,000 prompts in three domains, small enough to train a Llama of some 116,000
parameters on a CPU and to judge every completion by rule. It lets `trl-cdr demo`, the examples and the tests run the
real pipeline (TRL's trainer, `CDRReward`, the scorer) with no download. It is not a benchmark: what holds here is a
check of the machinery and of the idea, not a claim about large models.

    world      prompts, right and wrong completions, the gold rules.      pure Python
    steering   criteria, exemplars and styles in that language.           pure Python
    models     tokenizer, training, the cached checkpoints, sampling.     torch + transformers
    story      the demo: accuracy of the ratio, three online DPO runs.    trl
    customize  the demo of criteria, on the steerable pair.               trl
    figure     the demos' figures.                                        matplotlib

Importing the package loads none of them.
"""
