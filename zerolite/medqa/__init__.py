"""The application: fine-tuning on medical questions and answers, on public names of zerolite only."""
