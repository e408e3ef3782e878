"""What a sweep needs before it starts: tokens that are missing, what they and the trainings cost, and why."""
