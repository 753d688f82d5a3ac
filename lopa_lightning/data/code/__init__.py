"""MBPP and CRUXEval: prompts, programs made of completions, and their scores."""
