"""What the pack tells its users in English and Chinese beside the errors: sentences, and the doctor."""
