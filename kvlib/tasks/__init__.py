"""What is asked and when it is right: problems by name, answers, grades. Never imports torch."""
