"""What a user does from the first photo to the last answer, each journey in one test."""
