"""What rounds and multiplies: the quantizer over all engines, products, and the choice between them."""
