"""Asking a model many questions: what is asked together, replies, label likelihoods, a file that resumes."""
