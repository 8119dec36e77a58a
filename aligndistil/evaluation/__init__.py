"""What trained models are worth, on the same held-out prompts and pairs.

`measurements` says what a recipe's comparison measures and reads the eval set, `model` measures one model, `rewards`
ranks pairs with the rewards that models stand for, `samples` has the numbers about samples, `rows` what models say of
rows, `metrics` declares all that is measured.
"""
