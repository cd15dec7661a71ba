"""`dae rank-teachers`: rewards, the student's losses, and CAR over a sweep of beta."""
