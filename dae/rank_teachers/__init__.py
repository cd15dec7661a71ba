"""Which teacher suits a student: rewards, the student's losses, and CAR over a sweep of beta."""
