def write(found, output): (output / 'table.md').write_text('later')
