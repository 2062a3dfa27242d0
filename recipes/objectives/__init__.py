"""What is minimised: a weighted sum of terms, each a sum over the tokens that a step predicts.

`terms.py` says what a config may name, `objective.py` adds it up, `layers.py` compares attention layers.
"""

from recipes.objectives.objective import Loss, Objective, next_token
from recipes.objectives.terms import CE, KL, TERMS, Layers, Term, TopKL, read_terms

__all__ = ["CE", "KL", "TERMS", "Layers", "Loss", "Objective", "Term", "TopKL", "next_token", "read_terms"]
