"""The rules, one file each, named after the rule's slug. `codes.py` lists them."""
