"""A run as others receive it: weights, tokenizer, licence, model card, data card, and how to make it again."""
