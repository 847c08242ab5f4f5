"""Whole models on PASA's attention, with the weights that Hugging Face directories hold."""
