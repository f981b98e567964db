"""Recipes that build the models and data shipped with elbowroom."""
