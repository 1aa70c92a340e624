"""What plan.py works with, and training never needs: laws of measured runs, and from a budget to the next run."""
