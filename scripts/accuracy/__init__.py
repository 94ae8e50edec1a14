"""Accuracy of compressed caches: tasks, servers and simulations asked the same questions, results and report."""
