"""What ``edgellm demo`` needs besides the other commands. Importing it loads nothing heavy."""
