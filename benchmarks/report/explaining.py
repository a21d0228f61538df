"""The page's plain words: what is measured and what the terms mean."""

from __future__ import annotations

INTRODUCTION = (
    "Preference training shows a language model pairs of answers, one better than the other, and"
    " makes the better one more probable. For every token of both answers the model's last layer,"
    " its head, compares a vector of D numbers with each of the V words of the vocabulary. That is"
    " a large share of the work, and written down plainly it needs a table of tokens times V"
    " numbers, often many gigabytes.",
    "fastdaa does this without the table, and shares what the two answers have in common. Here"
    " you see how long that takes, how much memory it needs and how exact it is, beside other"
    " ways to do the same work. All contenders get the same inputs and take turns in the same"
    " run (whole training steps on a GPU: one contender after another). First each result is"
    " checked against the same computation in 64-bit arithmetic; one that is off is marked WRONG"
    " and takes no part in any comparison of speed.",
)
KIND_TITLES = {
    "step": "A whole training step",
    "head": "The head alone",
    "loss": "The whole preference loss",
    "memory": "Peak memory",
    "accuracy": "Accuracy",
}
KIND_TEXTS = {
    "step": "Everything that a trainer does between two updates of the weights: preparing the"
    " pairs, running the frozen reference model and the model itself, gradients, optimizer,"
    " metrics. Same model and same pairs as TRL's DPOTrainer; the losses have to agree.",
    "head": "From the model's last hidden vectors to one log-probability a token, and back to the"
    " gradients. The dashed line is the floor: the time of the bare matrix products that nobody"
    " can do without, measured in the same run.",
    "loss": "The head and a preference loss on top (DPO, IPO, SLiC or APA), forward and backward,"
    " as a trainer calls it. The dashed line is the floor, as above.",
    "memory": "The most memory in use during one call, above the inputs that were there before and"
    " the gradients that remain after it.",
    "accuracy": "How far log-probabilities and gradients are from the same computation in 64-bit"
    " arithmetic, and whether two calls on the same inputs agree bit for bit. Filled marks are"
    " within the gate's limits, hollow red ones beyond them.",
    "compare": "Both versions were measured in the same run, in turns, on the same inputs, in"
    " several fresh processes each. A ratio above 1 means that the new version is slower. A"
    " verdict other than 'same' lies beyond the confidence interval and above the threshold.",
}
GLOSSARY = (
    ("contender", "One way to do the work: a library, or one of the paths through fastdaa."),
    ("N, V, D", "Scored tokens, words of the vocabulary, numbers of a hidden vector."),
    (
        "U",
        "One product of the hidden vectors with the head: 2 N V D operations. Log-probabilities"
        " alone take one U; with gradients of vectors and head, three; computing the scores a"
        " second time instead of keeping them, four.",
    ),
    (
        "floor",
        "The time of the bare products (1U to 5U) that a contender's way needs at least, timed in"
        " the same run without anything around them. 'x floor' is the contender's time over it:"
        " 1 would be perfect.",
    ),
    (
        "expected",
        "The time that a model of operations and memory traffic predicts. It is made for GPUs; a"
        " CPU keeps parts of the traffic in its caches and pays for exponentials.",
    ),
    (
        "median, p10 - p90",
        "Half of the calls were faster than the median; one in ten was faster than p10, one in"
        " ten slower than p90.",
    ),
    ("n", "Calls (of a whole step: steps) that were timed, after a warm-up that is not counted."),
    (
        "peak memory",
        "The most memory in use during a call, above inputs and returned gradients. For a whole"
        " step: above the weights of policy and reference, that is gradients, optimizer and"
        " activations.",
    ),
    (
        "error / limit",
        "The largest error against 64-bit arithmetic as a share of what the gate allows."
        " Above 1 the result is WRONG.",
    ),
    ("WRONG", "The result is further from the truth than the gate allows. It has no speed-up."),
    (
        "speed-up",
        "How many times as fast as the reference: plain PyTorch for head and loss, TRL's"
        " DPOTrainer for a step (in pairs a second).",
    ),
    (
        "flat, peaked",
        "How certain the model is about the next token. A trained model is (peaked); random"
        " numbers are not (flat), which flatters methods that skip small probabilities. The"
        " entropy in nats is stated: 0 is certain, log V is a blind guess.",
    ),
    (
        "head trained, frozen",
        "Whether the head's own weights get a gradient. They do not with LoRA, which saves a U.",
    ),
    ("FLOP use", "Operations that the training needs, over what the device could do meanwhile."),
    (
        "absent, skipped, failed",
        "Not installed or not for this device; cannot do this case; ended with an error.",
    ),
)
