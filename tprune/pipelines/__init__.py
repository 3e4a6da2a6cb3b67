"""One driver per family: (model, method, budget, data) to an edited model and a report."""
