"""Weights of which a forward pass reads the sum with thin factors, without computing that sum."""

from zo2ext.model.factored import products, views
from zo2ext.model.factored.tensor import Factored, Term, is_factored

__all__ = ["Factored", "Term", "is_factored", "products", "views"]
