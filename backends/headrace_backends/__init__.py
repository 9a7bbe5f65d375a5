"""The backends that run models, one file each, behind the contract in base.py."""
